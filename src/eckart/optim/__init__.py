"""Optimizers, gradient rules and private gradients for structured training."""

from eckart.optim.gradients import factor_rule as factor_rule
from eckart.optim.per_example import clipped_gradients as clipped_gradients
from eckart.optim.privacy import epsilon as epsilon
from eckart.optim.privacy import noise_for as noise_for
