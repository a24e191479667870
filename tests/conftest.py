"""Settings of the whole suite: one thread (two processes may share the machine), and reproducible property tests."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("eckart", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("eckart")
