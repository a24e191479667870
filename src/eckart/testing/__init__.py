"""The laws every map passes, shipped, so that maps written elsewhere can be held to them: start at `check_map`."""

from eckart.testing.case import Case as Case
from eckart.testing.case import LawError as LawError
from eckart.testing.cases import cases as cases
from eckart.testing.check import check_law as check_law
from eckart.testing.check import check_map as check_map
from eckart.testing.laws import LAWS as LAWS
