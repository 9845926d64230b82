"""glibc's allocator: whether tensors' memory goes back to the kernel after each pass, and comes back as new pages.

By default every large block does. One pass of sd21 at 512 px then takes a million page faults, each of which zeroes a
page on one core while the others wait: a fifth to a quarter of the time on two cores (docs/performance.md).
"""

from __future__ import annotations

import ctypes
from functools import cache

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.gnu_get_libc_version and library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):  # another C library
        return None


def keep_freed_memory() -> bool:
    """From now on the process keeps what it frees for what it allocates next, as torch does on a GPU.

    Large blocks of other threads still come from the kernel each time, which is glibc's way. The process stays as large
    as its largest pass was; `return_freed_memory` gives back what is free at that moment.

    Returns:
        Whether that is so now: only glibc (most of Linux) takes it; an allocator loaded in its place ignores it.
    """
    library = _glibc()
    return library is not None and bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Gives all free memory back to the kernel, once; without glibc nothing happens."""
    if _glibc() is not None:
        _glibc().malloc_trim(ctypes.c_size_t(0))
