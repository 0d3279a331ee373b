"""Builds a folder in the cache once, however many processes start at the same time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from fedmoe.runtime.cache import cache_or_temporary_root, cache_root
from fedmoe.runtime.files import fsync_files, fsync_folder


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`; if it is not there, one process fills a temporary folder by `build` and renames it.

    Others wait. A build that fails or is killed leaves nothing under the name. Where the cache cannot be written, what
    it holds is used all the same, and the rest is built for this process alone.
    """
    cached = cache_root()
    if cached is not None and (cached / name).is_dir():
        return cached / name
    root = cache_or_temporary_root()
    target = root / name
    with FileLock(str(root / f"{name}.lock")):
        if target.is_dir():
            return target
        for left_over in root.glob(f".{name}-*"):
            shutil.rmtree(left_over)
        temporary = root / f".{name}-{os.getpid()}"
        temporary.mkdir()
        try:
            build(temporary)
            fsync_files(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(root)
    return target
