"""File descriptors: raises this process's limit, counts those in use, warns when few are left."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_WANTED = 65_536
_FEW = 0.9
_OPEN = Path("/proc/self/fd")


def raise_limit() -> int:
    """Allow this process as many descriptors as its hard limit allows, at most 65,536; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft == resource.RLIM_INFINITY or soft >= limit:
        return _WANTED if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def in_use() -> int | None:
    """How many descriptors are open, this look included; None on systems that do not tell."""
    try:
        return len(os.listdir(_OPEN))
    except FileNotFoundError:
        return None
    except OSError:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # not even one for this look


def few_left(used: int | None, limit: int) -> bool:
    """Whether it is time to say something."""
    return used is not None and used >= _FEW * limit
