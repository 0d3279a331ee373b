"""File descriptors: raises this process's limit, counts those in use, warns when few are left."""

from __future__ import annotations

import os
from pathlib import Path

_WANTED = 65_536
_FEW = 0.9
_OPEN = Path("/proc/self/fd")


def raise_limit() -> int | None:
    """Allow this process as many descriptors as its hard limit allows, at most 65,536; how many that are.

    None on systems that have no such limit.
    """
    try:
        import resource
    except ModuleNotFoundError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        return _WANTED if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def in_use(limit: int | None) -> int | None:
    """How many descriptors are open of `limit`, this look included; None on systems that do not tell."""
    try:
        return len(os.listdir(_OPEN))
    except FileNotFoundError:
        return None
    except OSError:
        return limit  # not even one for this look


def few_left(used: int | None, limit: int | None) -> bool:
    """Whether it is time to say something."""
    return used is not None and limit is not None and used >= _FEW * limit
