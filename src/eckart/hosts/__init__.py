"""Maps inside torch: modules that hold a map, and finding, replacing and running the parts of a transformer."""

from eckart.hosts.anatomy import Anatomy as Anatomy
from eckart.hosts.anatomy import anatomy as anatomy
from eckart.hosts.anatomy import linear_layers as linear_layers
from eckart.hosts.anatomy import replace as replace
from eckart.hosts.base import Host as Host
from eckart.hosts.blockwise import Blockwise as Blockwise
from eckart.hosts.blockwise import Call as Call
from eckart.hosts.blockwise import release as release
from eckart.hosts.embedding import EmbeddingHost as EmbeddingHost
from eckart.hosts.embedding import TiedHead as TiedHead
from eckart.hosts.embedding import embedding_host as embedding_host
from eckart.hosts.heads import Heads as Heads
from eckart.hosts.heads import heads_of as heads_of
from eckart.hosts.host import host as host
from eckart.hosts.host import is_conv1d as is_conv1d
from eckart.hosts.host import is_linear as is_linear
from eckart.hosts.host import leaf as leaf
from eckart.hosts.host import map_of as map_of
from eckart.hosts.host import offset_of as offset_of
from eckart.hosts.neurons import Neurons as Neurons
from eckart.hosts.neurons import neurons_of as neurons_of
from eckart.hosts.residual import Residual as Residual
from eckart.hosts.residual import is_rms_norm as is_rms_norm
from eckart.hosts.residual import residual_of as residual_of
from eckart.hosts.residual import rotated as rotated
