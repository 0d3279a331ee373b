"""The coordinator's state directory: one process owns it, and only its user can read it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmoe.files import FolderInUseError, lock_folder
from fedmoe.storage.blobs import NO_ROOM, FolderBlobStore, no_room_to_start
from fedmoe.storage.journal import SqlJournal
from fedmoe.storage.migration import migrate
from fedmoe.storage.sqlite import opening_problem


class StateDirError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class StateDir:
    """An open, locked state directory; the lock is held as long as the process lives or until `close`."""

    path: Path
    journal: SqlJournal
    blobs: FolderBlobStore
    lock: int
    opened: Mapping[Path, tuple[int, int]]

    @classmethod
    def open(cls, path: Path) -> StateDir:
        """Create or open the folder and lock it; refuses one that another coordinator uses."""
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StateDirError(f"cannot create {path}: {error.strerror}; choose another --state-dir") from error
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise StateDirError(f"{path} is not writable for this user; fix its owner or choose another --state-dir")
        if path.stat().st_mode & 0o002:
            raise StateDirError(f"anybody may write to {path}; run 'chmod 700 {path}' first")
        try:
            lock = lock_folder(path)
        except FolderInUseError as error:
            raise StateDirError(
                f"{path} is in use by the coordinator with process id {error.holder}; "
                "stop it first or choose another --state-dir"
            ) from None
        try:
            journal = path / "journal.sqlite"
            os.close(os.open(journal, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite itself would make it readable to others
            migrate(journal)
            opened, blobs = SqlJournal(journal), FolderBlobStore(path / "blobs")
            return cls(path, opened, blobs, lock, {file: _identity(file) for file in (path, journal, blobs.folder)})
        except BaseException as error:
            os.close(lock)
            if isinstance(error, OSError):
                if error.errno in NO_ROOM:
                    raise no_room_to_start(path) from error
                raise StateDirError(f"{path} cannot be used: {error}; fix it or choose another --state-dir") from error
            if isinstance(error, sqlite3.Error):
                raise opening_problem(error, path / "journal.sqlite") from error
            raise

    def problem(self) -> str | None:
        """Why what is written now would be lost: the folder, or a part of it, is no longer the one that was opened.

        SQLite and open files would not notice: they write on into what nobody can reach any more.
        """
        for file, identity in self.opened.items():
            try:
                found = _identity(file)
            except OSError as error:
                return f"{file} is gone: {error.strerror}"
            if found != identity:
                return f"{file} was replaced by another one"
        return None

    def close(self) -> None:
        """Close the journal and give the lock back."""
        self.journal.close()
        os.close(self.lock)


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_dev, found.st_ino
