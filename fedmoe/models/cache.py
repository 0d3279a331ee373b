"""The cache folder of prepared base models, safe for several processes that start at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from fedmoe.files import fsync_files, fsync_folder


def cache_root() -> Path:
    """FEDMOE_CACHE, else ~/.cache/fedmoe."""
    return Path(os.environ.get("FEDMOE_CACHE") or Path.home() / ".cache" / "fedmoe").expanduser()


def make_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`; if it is not there, one process fills a temporary folder by `build` and renames it.

    Others wait. A build that fails or is killed leaves nothing under the name.
    """
    target = cache_root() / name
    if target.is_dir():
        return target
    cache_root().mkdir(parents=True, exist_ok=True)
    with FileLock(str(cache_root() / f"{name}.lock")):
        if target.is_dir():
            return target
        for left_over in cache_root().glob(f".{name}-*"):
            shutil.rmtree(left_over)
        temporary = cache_root() / f".{name}-{os.getpid()}"
        temporary.mkdir()
        try:
            build(temporary)
            fsync_files(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(cache_root())
    return target
