"""Optimizers and gradient rules for structured training."""

from eckart.optim.gradients import factor_rule as factor_rule
