"""Compression methods: a paper is a page, and one pipeline runs them all."""

from eckart.methods.compress.outcome import LayerPlan as LayerPlan
from eckart.methods.compress.outcome import Measured as Measured
from eckart.methods.compress.outcome import Outcome as Outcome
from eckart.methods.compress.outcome import Plan as Plan
from eckart.methods.compress.pipeline import compress as compress
from eckart.methods.compress.pipeline import plan as plan
from eckart.methods.compress.table import METHODS as METHODS
