"""Returns freed memory to the operating system, for long-running servers that are often idle."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt, from malloc.h.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE_BYTES = 256 << 10
_ARENAS = 2


def trim() -> None:
    """Give back what small blocks have left free between those that are used."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def give_back_freed_memory() -> None:
    """Give large blocks back to the system once they are freed, and keep few places for small ones; glibc only.

    By itself glibc takes the size of a freed block for the usual one: after the first freed update of 20 MB all others
    come from arenas, one for each thread, which keep what was freed.
    """
    if not _is_glibc():
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    mallopt(_M_ARENA_MAX, _ARENAS)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
