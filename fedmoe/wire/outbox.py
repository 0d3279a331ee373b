"""The worker's outbox: its identity, sequence number and pending update, safe against a kill at any moment.

The order makes it so: bytes first, then the identity file that names them and moves the sequence number on, then the
push, then the identity file without them. A number is therefore never used for two different updates, and an update
that was cut is sent until it is answered.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmoe.runtime import failpoints
from fedmoe.runtime.files import FolderInUseError, FolderLock, lock_folder, write_atomic
from fedmoe.wire.contract.messages import UpdateHeader

_IDENTITY = "identity.json"
_CHECKSUM = "sha256"
# Bodies of updates, and what a killed process was in the middle of writing.
_OURS = re.compile(r"update-\d+\.safetensors|\.(update-\d+\.safetensors|identity\.json)-[0-9a-f]{8}")


class OutboxError(Exception):
    """The state directory belongs to somebody else, is in use or is damaged; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PendingUpdate:
    """An update that was cut and not yet answered: its header, its bytes, and their sha256."""

    header: UpdateHeader
    body: bytes
    sha256: str


class _Identity(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    worker: str
    expert: str
    epoch: str
    next_sequence: Annotated[int, Field(ge=0)] = 0
    pending_header: UpdateHeader | None = None
    pending_sha256: str | None = None

    @model_validator(mode="after")
    def _number_is_taken(self) -> Self:
        pending = self.pending_header
        if (pending is None) != (self.pending_sha256 is None):
            raise ValueError("an update under way has a header and a hash")
        if pending is not None and (pending.sequence != self.next_sequence - 1 or pending.epoch != self.epoch):
            raise ValueError(f"update {pending.sequence} is under way, but the next number is {self.next_sequence}")
        return self


def _read_identity(data: bytes) -> _Identity:
    """What the file says; raises ValueError where it is not what was written. Older versions wrote no checksum."""
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    checksum = values.pop(_CHECKSUM, None)
    identity = _Identity.model_validate(values)
    if checksum is not None and checksum != _checksum(values):
        raise ValueError("its checksum is another: it is damaged, or was edited")
    return identity


def _checksum(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Outbox:
    """Identity, sequence numbers and the pending update of one worker, in a folder that no other process may use.

    Raises OutboxError if the folder is another worker's, in use, or damaged.
    """

    def __init__(self, folder: Path, worker: str, expert: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        try:
            self._lock: FolderLock | None = lock_folder(folder)
        except FolderInUseError as error:
            raise OutboxError(
                f"{folder} is in use by the worker with process id {error.holder}; "
                "stop it first or choose another --state-dir"
            ) from None
        try:
            mine = self._identity = self._load() or _Identity(worker=worker, expert=expert, epoch=secrets.token_hex(8))
            if (mine.worker, mine.expert) != (worker, expert):
                raise OutboxError(
                    f"{folder} belongs to worker {mine.worker!r} training {mine.expert!r}, "
                    f"not to {worker!r} training {expert!r}; choose another --state-dir"
                )
            self._pending = self._load_pending()
            self._sweep()
            self._store(mine)
        except BaseException:
            self.close()
            raise

    @property
    def epoch(self) -> str:
        """Names this worker's state directory; numbers start anew with a new one."""
        return self._identity.epoch

    @property
    def next_sequence(self) -> int:
        """The number the next update will get."""
        return self._identity.next_sequence

    @property
    def pending(self) -> PendingUpdate | None:
        """The update that was cut and not answered."""
        return self._pending

    def cut(self, header: UpdateHeader, body: bytes) -> PendingUpdate:
        """Make an update durable under the next number, which the header gets; only then may it be sent."""
        if self._pending is not None:
            raise OutboxError("an update is still under way; it must be answered before another is cut")
        numbered = header.model_copy(update={"epoch": self.epoch, "sequence": self.next_sequence})
        sha256 = hashlib.sha256(body).hexdigest()
        write_atomic(self._body_path(self.next_sequence), body)
        failpoints.reached("worker.body_written")
        under_way = {"next_sequence": numbered.sequence + 1, "pending_header": numbered, "pending_sha256": sha256}
        self._store(self._identity.model_copy(update=under_way))
        failpoints.reached("worker.cut")
        self._pending = PendingUpdate(numbered, body, sha256)
        return self._pending

    def settle(self) -> None:
        """Forget the pending update, which was answered one way or the other."""
        if self._pending is None:
            return
        self._store(self._identity.model_copy(update={"pending_header": None, "pending_sha256": None}))
        failpoints.reached("worker.settled")
        self._body_path(self._pending.header.sequence).unlink(missing_ok=True)
        self._pending = None

    def close(self) -> None:
        """Give the folder back; a second time does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    def _body_path(self, sequence: int) -> Path:
        return self._folder / f"update-{sequence}.safetensors"

    def _store(self, identity: _Identity) -> None:
        values = identity.model_dump(mode="json")
        write_atomic(self._folder / _IDENTITY, json.dumps(values | {_CHECKSUM: _checksum(values)}, indent=1).encode())
        self._identity = identity

    def _load(self) -> _Identity | None:
        path = self._folder / _IDENTITY
        if not path.exists():
            return None
        try:
            return _read_identity(path.read_bytes())
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
        except ValueError as error:
            reason = str(error)
        raise OutboxError(f"{path} cannot be read ({reason}); move {self._folder} away to start with a new identity")

    def _load_pending(self) -> PendingUpdate | None:
        header, sha256 = self._identity.pending_header, self._identity.pending_sha256
        if header is None or sha256 is None:
            return None
        path = self._body_path(header.sequence)
        body = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(body).hexdigest() != sha256:
            raise OutboxError(f"{path} is damaged or missing; move {self._folder} away to start with a new identity")
        return PendingUpdate(header, body, sha256)

    def _sweep(self) -> None:
        """Remove bodies that never got a number or were answered just before a crash, and half-written files."""
        keep = self._body_path(self._pending.header.sequence).name if self._pending else None
        for path in self._folder.iterdir():
            if path.name != keep and _OURS.fullmatch(path.name):
                path.unlink()
