"""The algebra: what a weight can be and what follows from that."""

from eckart.maps.base import Blocks as Blocks
from eckart.maps.base import LinearMap as LinearMap
from eckart.maps.base import Product as Product
from eckart.maps.base import Scaled as Scaled
from eckart.maps.base import Spec as Spec
from eckart.maps.base import Sum as Sum
from eckart.maps.base import in_one_dtype as in_one_dtype
from eckart.maps.base import linear_map as linear_map
from eckart.maps.base import require as require
from eckart.maps.base import require_shape as require_shape
from eckart.maps.bitmap import Bitmap as Bitmap
from eckart.maps.bitmap import Scattered as Scattered
from eckart.maps.bitmap import bitmap as bitmap
from eckart.maps.bitmap import compressed_rows as compressed_rows
from eckart.maps.bitmap import packed as packed
from eckart.maps.bitmap import unpacked as unpacked
from eckart.maps.dense import Dense as Dense
from eckart.maps.dense import Diagonal as Diagonal
from eckart.maps.facts import Fact as Fact
from eckart.maps.facts import facts as facts
from eckart.maps.facts import rank_bound as rank_bound
from eckart.maps.gated import Gated as Gated
from eckart.maps.hadamard import Hadamard as Hadamard
from eckart.maps.interleaved import Interleaved as Interleaved
from eckart.maps.interleaved import interleaving as interleaving
from eckart.maps.kronecker import Kronecker as Kronecker
from eckart.maps.kronecker import arranged as arranged
from eckart.maps.kronecker import rearranged as rearranged
from eckart.maps.lowrank import LowRank as LowRank
from eckart.maps.lowrank import lowrank_numbers as lowrank_numbers
from eckart.maps.lowrank import random_lowrank as random_lowrank
from eckart.maps.lowrank import zero_map as zero_map
from eckart.maps.masked import Masked as Masked
from eckart.maps.norm import row_norms as row_norms
from eckart.maps.normalized import RowNormalized as RowNormalized
from eckart.maps.orthogonal import Cayley as Cayley
from eckart.maps.orthogonal import Householder as Householder
from eckart.maps.permutation import Permutation as Permutation
from eckart.maps.permutation import inverse_order as inverse_order
from eckart.maps.pivoted import Pivoted as Pivoted
from eckart.maps.pivoted import expands as expands
from eckart.maps.pivoted import multiply_pivoted as multiply_pivoted
from eckart.maps.pivoted import pivot as pivot
from eckart.maps.pivoted import pivoted_numbers as pivoted_numbers
from eckart.maps.pivoted import random_pivoted as random_pivoted
from eckart.maps.quantized import BITS as BITS
from eckart.maps.quantized import Quantized as Quantized
from eckart.maps.quantized import pack as pack
from eckart.maps.quantized import unpack as unpack
from eckart.maps.recomputed import multiply_by_rows as multiply_by_rows
from eckart.maps.rows import rows_of as rows_of
from eckart.maps.rules import simplify as simplify
from eckart.maps.selection import Placement as Placement
from eckart.maps.selection import Selection as Selection
from eckart.maps.sliced import sliced as sliced
from eckart.maps.sparse import NM as NM
from eckart.maps.sparse import Sparse as Sparse
from eckart.maps.sparse import by_compressed_rows as by_compressed_rows
from eckart.maps.sparse import multiply_compressed_rows as multiply_compressed_rows
from eckart.maps.sparse import n_of_m as n_of_m
from eckart.maps.sparse import sparse as sparse
from eckart.maps.sparse import sparse_of as sparse_of
from eckart.maps.spec import blank as blank
from eckart.maps.spec import from_spec as from_spec
from eckart.maps.storage import STORAGES as STORAGES
from eckart.maps.storage import Storage as Storage
from eckart.maps.storage import storage as storage
from eckart.maps.storage import stored as stored
from eckart.maps.tensor_train import TensorTrain as TensorTrain
from eckart.maps.tensor_train import factored as factored
from eckart.maps.tensor_train import tensor_train as tensor_train
from eckart.maps.thin import difference_of_vectors as difference_of_vectors
from eckart.maps.thin import fixed_vectors as fixed_vectors
from eckart.maps.thin import thin as thin
from eckart.maps.tiled import Tiled as Tiled
from eckart.maps.tucker import Tucker as Tucker
from eckart.maps.tucker import tucker_numbers as tucker_numbers

# Every map a checkpoint may name.
FAMILIES: dict[str, type[LinearMap]] = {
    cls.__name__: cls
    for cls in (
        Dense, LowRank, Pivoted, Diagonal, Permutation, Selection, Placement, Sparse, NM, Kronecker,
        Householder, Cayley, Tiled, TensorTrain, Tucker,
        Bitmap, Scattered, Quantized, Sum, Product, Scaled, Blocks, Interleaved, RowNormalized, Masked, Hadamard,
    )
}  # fmt: skip
