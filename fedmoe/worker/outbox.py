"""The outbox: a worker's identity and the one update that may be under way, safe against a kill at any moment.

The order makes it so: bytes first, then the identity file that names them and moves the sequence number on, then the
push, then the identity file without them. A number is therefore never used for two different updates, and an update
that was cut is sent until it is answered.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedmoe import failpoints
from fedmoe.files import write_atomic
from fedmoe.wire.messages import UpdateHeader

_IDENTITY = "identity.json"


class OutboxError(Exception):
    """The state directory belongs to somebody else or is damaged; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Pending:
    """An update that was cut and not yet answered: its header, its bytes, and their sha256."""

    header: UpdateHeader
    body: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class _Identity:
    worker: str
    expert: str
    epoch: str
    next_sequence: int
    pending_header: dict[str, object] | None = None
    pending_sha256: str | None = None


class Outbox:
    """Identity, sequence numbers and the pending update of one worker, in a folder of its own."""

    def __init__(self, folder: Path, worker: str, expert: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._identity = self._load() or _Identity(worker, expert, secrets.token_hex(8), 0)
        if (self._identity.worker, self._identity.expert) != (worker, expert):
            raise OutboxError(
                f"{folder} belongs to worker {self._identity.worker!r} training {self._identity.expert!r}, "
                f"not to {worker!r} training {expert!r}; choose another --state-dir"
            )
        self._pending = self._load_pending()
        self._sweep()
        self._store(self._identity)

    @property
    def epoch(self) -> str:
        """Names this worker's state directory; numbers start anew with a new one."""
        return self._identity.epoch

    @property
    def next_sequence(self) -> int:
        """The number the next update will get."""
        return self._identity.next_sequence

    @property
    def pending(self) -> Pending | None:
        """The update that was cut and not answered."""
        return self._pending

    def cut(self, header: UpdateHeader, body: bytes) -> Pending:
        """Make an update durable under the next number; only then may it be sent."""
        if self._pending is not None:
            raise OutboxError("an update is still under way; it must be answered before another is cut")
        numbered = header.model_copy(update={"epoch": self.epoch, "sequence": self.next_sequence})
        sha256 = hashlib.sha256(body).hexdigest()
        write_atomic(self._body_path(self.next_sequence), body)
        failpoints.reached("worker.body_written")
        self._store(
            replace(
                self._identity,
                next_sequence=self.next_sequence + 1,
                pending_header=numbered.model_dump(),
                pending_sha256=sha256,
            )
        )
        failpoints.reached("worker.cut")
        self._pending = Pending(numbered, body, sha256)
        return self._pending

    def settle(self) -> None:
        """The pending update was answered, one way or the other: forget it."""
        if self._pending is None:
            return
        self._store(replace(self._identity, pending_header=None, pending_sha256=None))
        failpoints.reached("worker.settled")
        self._body_path(self._pending.header.sequence).unlink(missing_ok=True)
        self._pending = None

    def _body_path(self, sequence: int) -> Path:
        return self._folder / f"update-{sequence}.safetensors"

    def _store(self, identity: _Identity) -> None:
        write_atomic(self._folder / _IDENTITY, json.dumps(asdict(identity), indent=1).encode())
        self._identity = identity

    def _load(self) -> _Identity | None:
        path = self._folder / _IDENTITY
        if not path.exists():
            return None
        try:
            return _Identity(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise OutboxError(
                f"{path} cannot be read ({error}); move the folder away to start with a new identity"
            ) from None

    def _load_pending(self) -> Pending | None:
        header, sha256 = self._identity.pending_header, self._identity.pending_sha256
        if header is None or sha256 is None:
            return None
        numbered = UpdateHeader.model_validate(header)
        path = self._body_path(numbered.sequence)
        body = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(body).hexdigest() != sha256:
            raise OutboxError(f"{path} is damaged or missing; move {self._folder} away to start with a new identity")
        return Pending(numbered, body, sha256)

    def _sweep(self) -> None:
        """Remove bodies that never got a number or were answered just before a crash."""
        keep = self._body_path(self._pending.header.sequence).name if self._pending else None
        for path in self._folder.glob("update-*.safetensors*"):
            if path.name != keep:
                os.unlink(path)
