"""Settings of the whole suite: one thread (two processes may share the machine), and reproducible property tests."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("eckart", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("eckart")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep statistics of tests, and of processes they start, out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECKART_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
