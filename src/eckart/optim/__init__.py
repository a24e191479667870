"""Optimizers, gradient rules and private gradients for structured training."""

from eckart.optim.gradients import factor_rule as factor_rule
from eckart.optim.moments import carry_over as carry_over
from eckart.optim.moments import count_apart as count_apart
from eckart.optim.moments import forget as forget
from eckart.optim.per_example import clipped_gradients as clipped_gradients
from eckart.optim.privacy import epsilon as epsilon
from eckart.optim.privacy import noise_for as noise_for
