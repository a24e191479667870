"""Dictionaries of a module that count their changes, so that one comparison shows whether any of them changed."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, cast

from torch import nn

REGISTERED = ("_modules", "_parameters", "_buffers")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Changes:
    """How often the dictionaries watched for its owner changed."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


def _counted(change: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that changes a watched dictionary and counts that, even where it fails halfway."""

    @wraps(change)
    def counted(self: "WatchedDict | WatchedOrderedDict", *args: Any, **kwargs: Any) -> Any:
        try:
            return change(self, *args, **kwargs)
        finally:
            for changes in self.watchers:
                changes.count += 1

    return counted


def _as_plain(self: "WatchedDict | WatchedOrderedDict", protocol: Any) -> tuple[Any, ...]:
    """Copies and pickles are plain dictionaries: who copies a module watches its own, and loading needs no eckart."""
    return type(self).__base__, (), None, None, cast(Iterator[Any], iter(self.items()))


class WatchedDict(dict[Any, Any]):
    """A `dict` that counts its changes. It refers to counters alone: modules must stay free of cycles."""

    __slots__ = ("watchers",)

    def __init__(self, items: dict[Any, Any]) -> None:
        self.watchers: list[Changes] = []
        super().__init__(items)

    __setitem__ = _counted(dict.__setitem__)
    __delitem__ = _counted(dict.__delitem__)
    __ior__ = _counted(dict.__ior__)
    clear = _counted(dict.clear)
    pop = _counted(dict.pop)
    popitem = _counted(dict.popitem)
    setdefault = _counted(dict.setdefault)
    update = _counted(dict.update)
    __reduce_ex__ = _as_plain


class WatchedOrderedDict(OrderedDict[Any, Any]):
    """The same of an `OrderedDict`, which torch keeps hooks in."""

    __slots__ = ("watchers",)

    def __init__(self, items: dict[Any, Any]) -> None:
        self.watchers: list[Changes] = []
        super().__init__(items)

    __setitem__ = _counted(OrderedDict.__setitem__)
    __delitem__ = _counted(OrderedDict.__delitem__)
    __ior__ = _counted(OrderedDict.__ior__)
    clear = _counted(OrderedDict.clear)
    pop = _counted(OrderedDict.pop)
    popitem = _counted(OrderedDict.popitem)
    setdefault = _counted(OrderedDict.setdefault)
    update = _counted(OrderedDict.update)
    __reduce_ex__ = _as_plain


def watch(module: nn.Module, names: tuple[str, ...], changes: Changes) -> None:
    """Count all changes of dictionaries of a module from now on; what they hold stays as it is.

    Args:
        module: whose dictionaries.
        names: of the attributes that are the dictionaries. Hooks must be watched while there are none: the handle that
            removes a hook knows the dictionary that it is in.
        changes: what is to count them, beside what counts them already.
    """
    for name in names:
        store = module.__dict__[name]
        if not isinstance(store, WatchedDict | WatchedOrderedDict):
            store = WatchedOrderedDict(store) if isinstance(store, OrderedDict) else WatchedDict(store)
            module.__dict__[name] = store
        if not any(known is changes for known in store.watchers):
            store.watchers.append(changes)
