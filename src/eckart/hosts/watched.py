"""Dictionaries of modules that report their changes, so that a look at one flag tells whether any of them changed."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, cast
from weakref import ref

from torch import nn

REGISTERED = ("_modules", "_parameters", "_buffers")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Watcher:
    """What holds as long as none of the dictionaries it watches changes.

    Attributes:
        holds: whether none changed.
    """

    __slots__ = ("__weakref__", "holds")

    def __init__(self) -> None:
        self.holds = True


def _reported(change: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that changes a watched dictionary and reports that, even where it fails halfway."""

    @wraps(change)
    def reported(self: "WatchedDict | WatchedOrderedDict", *args: Any, **kwargs: Any) -> Any:
        try:
            return change(self, *args, **kwargs)
        finally:
            _report(self)

    return reported


def _report(store: "WatchedDict | WatchedOrderedDict") -> None:
    for reference in store.watchers:
        watcher = reference()
        if watcher is not None:
            watcher.holds = False


def _as_plain(self: "WatchedDict | WatchedOrderedDict", protocol: Any) -> tuple[Any, ...]:
    """Make copies and pickles plain dictionaries: nobody watches those, and to load them eckart is not needed."""
    return type(self).__base__, (), None, None, cast(Iterator[Any], iter(self.items()))


class WatchedDict(dict[Any, Any]):
    """A `dict` that reports its changes. It refers to nothing strongly: modules must stay free of cycles."""

    __slots__ = ("watchers",)

    def __init__(self, items: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = ()) -> None:
        self.watchers: list[ref[Watcher]] = []
        super().__init__(items)

    def __contains__(self, key: object) -> bool:
        """Tell whether there is an item. Torch asks that of the parameters for every attribute it sets or deletes, and
        a `forward` of its own changes what a module does.
        """
        if key == "forward":
            _report(self)
        return super().__contains__(key)

    __setitem__ = _reported(dict.__setitem__)
    __delitem__ = _reported(dict.__delitem__)
    __ior__ = _reported(dict.__ior__)
    clear = _reported(dict.clear)
    pop = _reported(dict.pop)
    popitem = _reported(dict.popitem)
    setdefault = _reported(dict.setdefault)
    update = _reported(dict.update)
    __reduce_ex__ = _as_plain


class WatchedOrderedDict(OrderedDict[Any, Any]):
    """The same of an `OrderedDict`, which torch keeps hooks in."""

    __slots__ = ("watchers",)

    def __init__(self, items: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = ()) -> None:
        self.watchers: list[ref[Watcher]] = []
        super().__init__(items)

    __setitem__ = _reported(OrderedDict.__setitem__)
    __delitem__ = _reported(OrderedDict.__delitem__)
    __ior__ = _reported(OrderedDict.__ior__)
    clear = _reported(OrderedDict.clear)
    pop = _reported(OrderedDict.pop)
    popitem = _reported(OrderedDict.popitem)
    setdefault = _reported(OrderedDict.setdefault)
    update = _reported(OrderedDict.update)
    __reduce_ex__ = _as_plain


def watch(module: nn.Module, names: tuple[str, ...], watcher: Watcher) -> None:
    """Have all changes of dictionaries of a module reported from now on; what they hold stays as it is.

    Args:
        module: whose dictionaries.
        names: of the attributes that are the dictionaries. Hooks must be watched while there are none: the handle that
            removes a hook knows the dictionary that it is in.
        watcher: what is to be told.
    """
    for name in names:
        store = module.__dict__[name]
        if not isinstance(store, WatchedDict | WatchedOrderedDict):
            store = WatchedOrderedDict(store) if isinstance(store, OrderedDict) else WatchedDict(store)
            module.__dict__[name] = store
        store.watchers = [*(known for known in store.watchers if known() is not None), ref(watcher)]
