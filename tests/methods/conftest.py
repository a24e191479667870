"""The demonstration model and text, compressed quickly, with a cache that no other run shares."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

import eckart
from eckart.methods import reload
from eckart.methods.compress.outcome import Outcome
from eckart.methods.compress.table import recipe_of

DEMO = Path(str(files("eckart"))) / "demo"
# Small enough that a run takes a second.
QUICK = {"samples": 4, "length": 48}
# Published defaults that would take long: epochs of healing, rounds of learning.
FEWER = {
    "aa-svd": {"heal": 1},
    "cospadi": {"iterations": 1},
    "compot": {"iterations": 2},
    "oats": {"iterations": 2},
    "lrq": {"heal": 1},
    "fusegpt": {"epochs": 1},
    "eckart-mixed": {"iterations": 1},
    "trp": {"steps": 4, "interval": 2},
    "pela": {"tune": 3},
    "maestro": {"steps": 3, "tune": 2},
    "acip": {"steps": 4, "tune": 2, "rate": 0.1},
    "dobi-svd": {"steps": 2, "batch": 2},
    "zs-svd": {"corrections": 1},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty statistics cache."""
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demonstration model."""
    return DEMO / "stories260k"


@pytest.fixture(scope="session")
def text() -> Path:
    """Its calibration text."""
    return DEMO / "train.txt"


@pytest.fixture(scope="session")
def quick() -> Callable[..., dict]:
    """Arguments of `compress` and `plan` for a quick run of a method on the demonstration text."""

    def arguments(method: str, **settings) -> dict:
        merged = {**FEWER.get(method, {}), **settings}
        return {"method": method, "calibration": DEMO / "train.txt", "settings": merged, **QUICK}

    return arguments


@pytest.fixture(scope="session")
def compressed(tmp_path_factory, quick, demo) -> Callable[[str], Outcome]:
    """The demonstration model at 0.7 by a method (1 if it only quantizes), made once per session."""
    made: dict[str, Outcome] = {}
    parent, folder = tmp_path_factory.mktemp("compressed"), tmp_path_factory.mktemp("cache")

    def by(method: str) -> Outcome:
        if method not in made:
            keep = 0.7 if recipe_of(method).reduces else 1.0
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ECKART_CACHE", str(folder))
                made[method] = eckart.compress(demo, parent / method, keep=keep, **quick(method))
        return made[method]

    return by


@pytest.fixture(scope="session", autouse=True)
def _checks_in_this_process():
    """Let outputs be checked without starting a process, which takes seconds for imports alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eckart.methods.compress.check.fresh_process", reload.run)
        yield
