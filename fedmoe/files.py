"""Files that are whole or not there: written aside, fsynced, renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file so that a crash leaves the old one or the new one; durable on return."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        for name, data in files.items():
            write_atomic(temporary / name, data, 0o644)
        if folder.exists():
            old = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.old")
            os.rename(folder, old)
            os.rename(temporary, folder)
            shutil.rmtree(old)
        else:
            os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and new names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
