"""Giving freed memory back to the operating system."""

import ctypes
import sys


def return_memory() -> None:
    """Have the C library return what it holds of freed memory, where it can: on Linux with glibc.

    Matrices of up to 32 MB come from one heap, in which a few long-lived ones keep all freed space in between: after
    some blocks the process is several times as large as what it uses.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
