"""The cache folder of prepared base models, safe for several processes that start at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


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
            sync_folder(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(cache_root())
    return target


def write_atomic(file: Path, data: bytes) -> None:
    """Write `data` under a temporary name, make it durable, rename it: `file` is never half-written."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(file.parent)


def sync_folder(folder: Path) -> None:
    """Make every file of `folder` and the folder itself durable."""
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
