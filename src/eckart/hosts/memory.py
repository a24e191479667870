"""How much memory a process has taken, and giving back what it has freed."""

import ctypes
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def return_memory() -> None:
    """Have the C library return what it holds of freed memory, where it can: on Linux with glibc.

    Matrices of up to 32 MB come from one heap, in which a few long-lived ones keep all freed space in between: after
    some blocks the process is several times as large as what it uses.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    On Linux not from `getrusage`, which begins with what the parent held when it started this process.
    """
    if STATUS.is_file():
        lines = (line.split() for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines())
        found = next((int(line[1]) for line in lines if line and line[0] == "VmHWM:"), None)
        if found is not None:
            return found * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, others in KiB
