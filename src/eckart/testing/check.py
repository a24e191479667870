"""`check_map`: the laws of the algebra for maps written anywhere, this package or yours."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from eckart.errors import EckartError
from eckart.maps import FAMILIES, LinearMap
from eckart.testing.case import Case, LawError
from eckart.testing.laws import LAWS

Instance = LinearMap | Case | tuple[LinearMap, Tensor]


def check_map(
    instances: Instance | Iterable[Instance] | Callable[[], Instance | Iterable[Instance]],
    *,
    families: Iterable[type[LinearMap]] = (),
    laws: Iterable[str] | None = None,
) -> int:
    """Hold maps to every law of the algebra: values, adjoints, facts, files, gradients, tracing, stated cost.

    Give several instances: full and low rank, rectangular both ways, 1 x 1, asymmetric. Numbers are cast to float64.

        >>> from eckart.maps import Diagonal
        >>> check_map(Diagonal(torch.arange(3.0)))
        17

    Args:
        instances: maps, or pairs of a map and its matrix (m, n) made another way, or a function returning those. A
            map alone is compared with its own `dense()`.
        families: map classes that a spec may name, beside those of eckart and of the instances themselves.
        laws: names of the laws to check (`eckart.testing.LAWS`); None for all.

    Returns:
        How many pairs of law and instance were checked.

    Raises:
        LawError: an `AssertionError` naming the law, the case, and what differed.
        EckartError: if there is no instance, or no law of a name.
    """
    if callable(instances) and not isinstance(instances, LinearMap):
        instances = instances()
    if isinstance(instances, (LinearMap, Case)) or _is_pair(instances):
        instances = (instances,)  # type: ignore[assignment]
    cases = [_case(i, item, families) for i, item in enumerate(instances)]  # type: ignore[arg-type]
    names = list(LAWS) if laws is None else list(laws)
    unknown = [name for name in names if name not in LAWS]
    if unknown or not cases or not names:
        raise EckartError(
            f"check_map got {len(cases)} instances and the laws {names}; "
            f"give at least one instance and any of {', '.join(LAWS)}"
        )
    for case in cases:
        for name in names:
            check_law(name, case)
    return len(cases) * len(names)


def check_law(name: str, case: Case) -> None:
    """Check one law on one case.

    Raises:
        LawError: naming the law, the case, and what differed or which error came from inside.
    """
    try:
        LAWS[name](case)
    except Exception as error:
        came = str(error) if isinstance(error, LawError) else f"{type(error).__name__}: {error}"
        raise LawError(f"law {name!r} is broken by {case.name}: {came}") from error


def _is_pair(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor)


def _case(index: int, item: Any, families: Iterable[type[LinearMap]]) -> Case:
    if isinstance(item, Case):
        return item
    map_, matrix = item if _is_pair(item) else (item, None)
    if not isinstance(map_, LinearMap):
        raise EckartError(f"check_map instance {index} is a {type(map_).__name__}; give linear maps")
    map_ = map_.to(torch.float64)
    matrix = map_.dense() if matrix is None else matrix.double()
    known = {**FAMILIES, **{cls.__name__: cls for cls in (*families, *_types(map_))}}
    return Case(f"instance {index}, {map_!r}", map_, matrix, known)


def _types(map_: LinearMap) -> Iterator[type[LinearMap]]:
    """Yield the classes of a map and of all maps inside it."""
    yield type(map_)
    inner, _ = pytree.tree_flatten(map_, is_leaf=lambda part: isinstance(part, LinearMap) and part is not map_)
    for part in inner:
        if isinstance(part, LinearMap):
            yield from _types(part)
