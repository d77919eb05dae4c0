"""Keeping the pages of freed memory: what plain hooks lose on a CPU is not copying, but page faults.

Kept activations stop the allocator from using the same memory again, and glibc hands large blocks back to the kernel when
they are freed and maps fresh pages, each of which faults once, for the next. With a higher threshold it keeps them:
plain hooks that capture four sites of all 30 layers of the embedded model (4 x 128 tokens, two cores) fell from 1.08 to 1.03 of
a pass through the body alone (`tests/benchmarks/capture.py`).
"""

import ctypes
import sys
from functools import cache

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
_KEPT = 1 << 30


@cache
def keep_pages() -> bool:
    """Raise glibc's thresholds for the rest of the process, once; whether that was possible."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, _KEPT) and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT))
    except (OSError, AttributeError):  # another C library
        return False
