"""How an adapter was made: what is remembered of it, and saved with it."""

from dataclasses import dataclass
from typing import Any

from eckart.methods.adapt.recipe import Recipe
from eckart.methods.adapt.table import adapter_recipe


@dataclass(frozen=True, slots=True)
class Described:
    """How an adapter was made.

    Attributes:
        method: its name.
        settings: those given.
        seed: seed of everything random in its start.
        trained: modules that train whole beside it.
    """

    method: str
    settings: dict[str, Any]
    seed: int
    trained: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        """Return the method's recipe."""
        return adapter_recipe(self.method, self.settings)
