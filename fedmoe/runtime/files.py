"""Atomic, durable files and folders (written aside, fsynced, renamed), and locks on folders."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe.runtime.errors import ExpectedError

if TYPE_CHECKING:
    from filelock import BaseFileLock


class FolderInUseError(ExpectedError):
    """Another process holds the folder; `holder` is its process id as far as it is known."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is in use by the process with id {holder}")
        self.holder = holder


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file so that a crash leaves the old one or the new one; durable on return.

    A process killed in between leaves a file named `.NAME-XXXXXXXX` behind, which owners of a folder sweep up.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_folder_atomic(folder: Path, files: Mapping[str, bytes], force: bool = False) -> None:
    """Write a folder of files so that it is there complete or not at all; an existing one only goes with `force`."""
    if folder.exists() and not force:
        raise FileExistsError(f"{folder} exists; choose another place or pass --force to replace it")
    with whole_folder(folder) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when all went well and is gone when not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        fsync_files(temporary)
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)


def _replace_folder(new: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(new, folder)
        return
    old = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}-old")
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def fsync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder durable."""
    if hasattr(os, "O_DIRECTORY"):  # elsewhere folders cannot be synced
        fsync_file(folder, os.O_DIRECTORY)


def fsync_files(folder: Path) -> None:
    """Make the content of every file of a folder, and their names, durable."""
    for file in folder.iterdir():
        fsync_file(file)
    fsync_folder(folder)


def fsync_file(path: Path, flags: int = 0) -> None:
    """Make the content of a file durable."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """A folder that this process owns until `close`, or until it ends."""

    def __init__(self, lock: BaseFileLock) -> None:
        self._lock = lock

    def close(self) -> None:
        """Give the folder back."""
        self._lock.release()


def lock_folder(folder: Path) -> FolderLock:
    """Own a folder as long as this process lives or until the returned lock is closed.

    Raises FolderInUseError when another process, or another part of this one, owns it.
    """
    # Here, so that commands without a folder do not pay for it.
    from filelock import FileLock, SoftFileLock, Timeout

    file = folder / "lock"
    # Not of one thread: whoever closes it may be another one.
    lock = FileLock(file, mode=0o600, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FolderInUseError(folder, _holder(file)) from None
    if not isinstance(lock, SoftFileLock):  # which writes it by itself
        with suppress(PermissionError):  # Windows lets nobody write into what is locked
            file.write_text(f"{os.getpid()}\n")
    return FolderLock(lock)


def _holder(file: Path) -> str:
    """The process id that the holder of a lock has written, as far as it can be read."""
    try:
        return file.read_text(errors="replace")[:32].partition("\n")[0].strip() or "unknown"
    except OSError:
        return "unknown"
