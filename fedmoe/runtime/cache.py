"""Cache folders for what can be made again (base models, hashes, tokenised data), and folders built once in them.

A home that cannot be written costs a cache and a warning, not the run.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fedmoe.runtime.files import fsync_files, fsync_folder, write_atomic
from fedmoe.runtime.logs import warn


def cache_root() -> Path | None:
    """FEDMOE_CACHE, else ~/.cache/fedmoe, to be read from; None where there is no home."""
    try:
        return Path(os.environ.get("FEDMOE_CACHE") or Path.home() / ".cache" / "fedmoe").expanduser()
    except RuntimeError:  # a user id without a name and without HOME
        return None


def cache_folder(purpose: str) -> Path | None:
    """The folder `purpose` of the cache, made and fit to be written; None where the cache cannot be written.

    Nothing is kept then, and one warning in the life of the process says so and what to do. A write may still fail,
    on a full disk for example.
    """
    root = cache_root()
    if root is None or not can_be_written(root):
        return None
    folder = root / purpose
    return folder if can_be_written(folder) else None


def kept_file(purpose: str, name: str) -> Path | None:
    """The file `name` of the folder `purpose` if the cache holds it; a cache that can only be read will do."""
    root = cache_root()
    file = root / purpose / name if root is not None else None
    try:
        return file if file is not None and file.is_file() else None
    except OSError:  # a folder on the way is closed to us
        return None


def keep_file(purpose: str, name: str, content: bytes) -> None:
    """Write the file `name` of the folder `purpose` whole; a cache that does not take it costs one warning."""
    folder = cache_folder(purpose)
    if folder is None:
        return
    try:
        write_atomic(folder / name, content)
    except OSError as error:  # full, for example
        warn("not_cached", file=str(folder / name), reason=str(error))


def cache_or_temporary_root() -> Path:
    """The cache's folder to build in; where it cannot be written, a temporary one that goes when this process ends."""
    root = cache_root()
    return root if root is not None and can_be_written(root) else temporary_root()


def temporary_root() -> Path:
    """A folder for what the caches do not take, the same for the whole process, gone when it ends."""
    return _temporary_root(os.getpid())


@cache
def can_be_written(folder: Path, variable: str = "FEDMOE_CACHE") -> bool:
    """Whether a folder is there, or can be made, and takes files; looked at, and if need be complained about, once.

    `variable` of the environment names another folder instead.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        fix = f"set {variable} to a folder that can be written"
        warn("cache_not_writable", folder=str(folder), reason=str(error), fix=fix)
        return False


@cache
def _temporary_root(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fedmoe-cache-"))

    def remove() -> None:
        if os.getpid() == process:  # a child that was forked leaves its parent's folder alone
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`; if it is not there, one process fills a temporary folder by `build` and renames it.

    Others wait. A build that fails or is killed leaves nothing under the name. Where the cache cannot be written, what
    it holds is used all the same, and the rest is built for this process alone.
    """
    from filelock import FileLock  # comes with the extra `fedmoe[worker]`, as all that is built does

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
