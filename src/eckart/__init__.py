"""eckart: one algebra of structured linear maps to compress, adapt, train, merge and inspect neural networks.

Every public name is imported at its first use, so that `import eckart` costs nothing and needs neither torch's nor
transformers' import; `PUBLIC` says where each lives.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from eckart import _autoload
from eckart.errors import EckartError as EckartError

if TYPE_CHECKING:
    from eckart.files.attention import AdaptiveAttention as AdaptiveAttention
    from eckart.files.attention import load_attention as load_attention
    from eckart.files.delta import Restored as Restored
    from eckart.files.delta import restore as restore
    from eckart.files.delta import show_delta as show_delta
    from eckart.files.inspect import densify as densify
    from eckart.files.inspect import show as show
    from eckart.files.loading import load as load
    from eckart.files.slicing import slice_folder as slice_folder
    from eckart.fit import Metric as Metric
    from eckart.fit import metric as metric
    from eckart.fit import regress as regress
    from eckart.hosts import host as host
    from eckart.hosts import map_of as map_of
    from eckart.linalg import top_eigen as top_eigen
    from eckart.linalg import truncated_svd as truncated_svd
    from eckart.maps import FAMILIES as FAMILIES
    from eckart.maps import NM as NM
    from eckart.maps import Bitmap as Bitmap
    from eckart.maps import Blocks as Blocks
    from eckart.maps import Cayley as Cayley
    from eckart.maps import Dense as Dense
    from eckart.maps import Diagonal as Diagonal
    from eckart.maps import Gated as Gated
    from eckart.maps import Hadamard as Hadamard
    from eckart.maps import Householder as Householder
    from eckart.maps import Interleaved as Interleaved
    from eckart.maps import Kronecker as Kronecker
    from eckart.maps import LinearMap as LinearMap
    from eckart.maps import LowRank as LowRank
    from eckart.maps import Masked as Masked
    from eckart.maps import Permutation as Permutation
    from eckart.maps import Pivoted as Pivoted
    from eckart.maps import Placement as Placement
    from eckart.maps import Product as Product
    from eckart.maps import Quantized as Quantized
    from eckart.maps import RowNormalized as RowNormalized
    from eckart.maps import Scaled as Scaled
    from eckart.maps import Scattered as Scattered
    from eckart.maps import Selection as Selection
    from eckart.maps import Sparse as Sparse
    from eckart.maps import Sum as Sum
    from eckart.maps import TensorTrain as TensorTrain
    from eckart.maps import Tiled as Tiled
    from eckart.maps import Tucker as Tucker
    from eckart.maps import linear_map as linear_map
    from eckart.maps import pivot as pivot
    from eckart.maps import simplify as simplify
    from eckart.methods.adapt.adapt import adapt as adapt
    from eckart.methods.adapt.adapt import adapters as adapters
    from eckart.methods.adapt.adapt import start_statistics as start_statistics
    from eckart.methods.adapt.adapters import Adapters as Adapters
    from eckart.methods.adapt.calibration import calibration_error as calibration_error
    from eckart.methods.adapt.calibration import fit_temperature as fit_temperature
    from eckart.methods.adapt.federated import Federated as Federated
    from eckart.methods.adapt.federated import federate as federate
    from eckart.methods.adapt.federated import recombine as recombine
    from eckart.methods.adapt.folding import Folded as Folded
    from eckart.methods.adapt.folding import fold_adapters as fold_adapters
    from eckart.methods.adapt.loading import load_adapter as load_adapter
    from eckart.methods.adapt.table import ADAPTERS as ADAPTERS
    from eckart.methods.adapt.tune import Tuned as Tuned
    from eckart.methods.adapt.tune import tune as tune
    from eckart.methods.attention import adaptive_attention as adaptive_attention
    from eckart.methods.compress.outcome import LayerPlan as LayerPlan
    from eckart.methods.compress.outcome import Outcome as Outcome
    from eckart.methods.compress.outcome import Plan as Plan
    from eckart.methods.compress.pipeline import compress as compress
    from eckart.methods.compress.pipeline import plan as plan
    from eckart.methods.compress.table import METHODS as METHODS
    from eckart.methods.delta.ere import delta as delta
    from eckart.methods.delta.outcome import Delta as Delta
    from eckart.methods.delta.outcome import TensorDelta as TensorDelta
    from eckart.methods.evaluate import evaluate as evaluate
    from eckart.methods.evaluation import Evaluation as Evaluation

    __version__: str

# The module of every public name. A test holds this table and the imports above to be the same.
PUBLIC: dict[str, str] = {
    name: module
    for module, names in {
        "eckart.methods.compress.pipeline": ("compress", "plan"),
        "eckart.methods.compress.outcome": ("Plan", "LayerPlan", "Outcome"),
        "eckart.methods.compress.table": ("METHODS",),
        "eckart.methods.evaluate": ("evaluate",),
        "eckart.methods.evaluation": ("Evaluation",),
        "eckart.methods.adapt.adapt": ("adapt", "adapters", "start_statistics"),
        "eckart.methods.adapt.adapters": ("Adapters",),
        "eckart.methods.adapt.calibration": ("calibration_error", "fit_temperature"),
        "eckart.methods.adapt.federated": ("federate", "Federated", "recombine"),
        "eckart.methods.adapt.folding": ("fold_adapters", "Folded"),
        "eckart.methods.adapt.loading": ("load_adapter",),
        "eckart.methods.adapt.table": ("ADAPTERS",),
        "eckart.methods.adapt.tune": ("tune", "Tuned"),
        "eckart.methods.attention": ("adaptive_attention",),
        "eckart.files.attention": ("AdaptiveAttention", "load_attention"),
        "eckart.methods.delta.ere": ("delta",),
        "eckart.methods.delta.outcome": ("Delta", "TensorDelta"),
        "eckart.files.delta": ("restore", "Restored", "show_delta"),
        "eckart.files.inspect": ("densify", "show"),
        "eckart.files.loading": ("load",),
        "eckart.files.slicing": ("slice_folder",),
        "eckart.fit": ("Metric", "metric", "regress"),
        "eckart.hosts": ("host", "map_of"),
        "eckart.linalg": ("top_eigen", "truncated_svd"),
        "eckart.maps": (
            "FAMILIES", "LinearMap", "linear_map", "simplify", "pivot",
            "Dense", "LowRank", "Pivoted", "Diagonal", "Permutation", "Selection", "Placement", "Sparse", "NM",
            "Kronecker", "Hadamard", "Householder", "Cayley", "Tiled", "TensorTrain", "Tucker",
            "Bitmap", "Quantized", "Scattered", "Sum", "Product", "Scaled", "Blocks", "Interleaved",
            "RowNormalized", "Masked", "Gated",
        ),
    }.items()
    for name in names
}  # fmt: skip
# Packages that only some of the library needs, and the extra that installs them.
EXTRAS = {"transformers": "hf", "accelerate": "hf", "tokenizers": "hf", "scipy": "eval"}


def _public(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("eckart")
    if name not in PUBLIC:
        raise AttributeError(f"module 'eckart' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise EckartError(f"eckart.{name} needs {package}; pip install 'eckart[{EXTRAS[package]}]'") from error
    globals()[name] = value  # the next use finds it without coming here
    return value


if not TYPE_CHECKING:  # type checkers see the imports above, and complain of any other name
    __getattr__ = _public


def __dir__() -> list[str]:
    return sorted({*PUBLIC, "EckartError", "__version__", *globals()})


_autoload.arm()
