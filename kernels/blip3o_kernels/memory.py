"""Where results live: freed memory kept by the process instead of being mapped anew for each of them."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the whole process and all libraries in it; whether the C library can.

    By default glibc maps every block of more than 32 MiB anew and gives it back when it is freed, so each large result
    of each op is paid for by page faults: several times the time of the op. After this call the process stays as
    large as it once was, and results land in memory that is there already. glibc alone knows this; elsewhere nothing
    changes. Source: mallopt(3).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
