"""How an adapter was made: what is remembered of it, and saved with it."""

from dataclasses import dataclass
from typing import Any

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.methods.adapt.combining import COMBINATIONS, combination
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe
from eckart.methods.adapt.table import adapter_recipe


@dataclass(frozen=True, slots=True)
class Described:
    """How an adapter was made.

    Attributes:
        method: its name, or the way in which other adapters were combined.
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
        if self.method in COMBINATIONS:
            combination(self.method, self.settings)
            return Recipe(self._refused, rate=1e-3)
        return adapter_recipe(self.method, self.settings)

    def _refused(self, layer: Layer) -> Adapter:
        raise EckartError(f"{self.method} combines adapters that are there; call eckart.adapters(model).combine(...)")
