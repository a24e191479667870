"""What the data says of every layer, streamed block by block."""

from eckart.stats.moments import CrossMoments as CrossMoments
from eckart.stats.moments import CrossSum as CrossSum
from eckart.stats.moments import Gradients as Gradients
from eckart.stats.moments import GradientSum as GradientSum
from eckart.stats.moments import Moments as Moments
from eckart.stats.moments import MomentSum as MomentSum
from eckart.stats.objectives import Objective as Objective
from eckart.stats.objectives import objective as objective
from eckart.stats.objectives import sentence_embedding as sentence_embedding
from eckart.stats.store import Store as Store
from eckart.stats.store import content_key as content_key
from eckart.stats.streaming import StopBlockError as StopBlockError
from eckart.stats.streaming import Stream as Stream
from eckart.stats.streaming import advance as advance
from eckart.stats.streaming import collect_gradients as collect_gradients
from eckart.stats.streaming import collect_inputs as collect_inputs
from eckart.stats.streaming import enter as enter
from eckart.stats.streaming import gradients_of as gradients_of
from eckart.stats.streaming import head_inputs as head_inputs
from eckart.stats.streaming import hooked as hooked
from eckart.stats.streaming import input_groups as input_groups
from eckart.stats.streaming import inputs_of as inputs_of
from eckart.stats.streaming import load_hidden as load_hidden
from eckart.stats.streaming import save_hidden as save_hidden
from eckart.stats.streaming import token_counts as token_counts
from eckart.stats.streaming import weight_gradients_of as weight_gradients_of
