"""The errors and warnings eckart raises: one sentence saying what came, what was expected, what to do."""


class EckartError(ValueError):
    """Bad input or an impossible request; the message is one sentence a person can act on."""


class NumericalWarning(UserWarning):
    """A result is right but less accurate than usual, and the message says by how much."""


class CostWarning(UserWarning):
    """A structured map had to become a dense matrix to answer the call."""
