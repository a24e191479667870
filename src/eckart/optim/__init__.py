"""Optimizers and gradient rules for structured training."""

from eckart.optim.gradients import factor_rule as factor_rule
from eckart.optim.moments import carry_over as carry_over
from eckart.optim.moments import count_apart as count_apart
from eckart.optim.moments import forget as forget
