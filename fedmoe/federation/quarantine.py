"""Quarantine: updates that are held back until an administrator releases or rejects them.

A held update is no part of any expert. It keeps its identity: the same bytes again get the same answer, before and
after the decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

from fedmoe.federation.events import Event, HeldUpdateRejected, Identity, UpdateAccepted, UpdateHeld
from fedmoe.runtime.errors import RefusedError

Value = TypeVar("Value")

#: Updates that may wait at once: of one worker, and of all that use one token (or none).
MOST_OF_A_WORKER = 8
MOST_OF_A_TOKEN = 64
#: Bytes that may wait of one token; a single update may be larger.
MOST_BYTES_OF_A_TOKEN = 2 << 30


@dataclass(frozen=True)
class Quarantine:
    """What is held, and what became of the rest, by identity; a value, replaced and never altered.

    `number` is that of the last event about a held update.
    """

    held: Mapping[Identity, UpdateHeld] = field(default_factory=lambda: MappingProxyType({}))
    rejected: Mapping[Identity, HeldUpdateRejected] = field(default_factory=lambda: MappingProxyType({}))
    released: Mapping[Identity, UpdateAccepted] = field(default_factory=lambda: MappingProxyType({}))
    number: int = 0

    def after(self, event: Event) -> Quarantine:
        """With one event more."""
        match event:
            case UpdateHeld():
                return replace(self, held=MappingProxyType({**self.held, event.identity: event}), number=event.number)
            case HeldUpdateRejected():
                rejected = MappingProxyType({**self.rejected, event.identity: event})
                held = _without(self.held, event.identity)
                return replace(self, held=held, rejected=rejected, number=event.number)
            case UpdateAccepted() if event.identity in self.held:
                released = MappingProxyType({**self.released, event.identity: event})
                return replace(self, held=_without(self.held, event.identity), released=released)
            case _:
                return self

    def knows(self, identity: Identity) -> bool:
        """Whether an update of this identity was ever held."""
        return identity in self.held or identity in self.rejected or identity in self.released

    def numbered(self, number: int) -> UpdateHeld:
        """The held update of this number; raises RefusedError if none waits under it."""
        for update in self.held.values():
            if update.number == number:
                return update
        waiting = ", ".join(str(held.number) for held in self.held.values()) or "none"
        raise RefusedError(
            "not_held",
            f"no update is held under the number {number}; held: {waiting}.",
            "'fedmoe quarantine' lists what is held.",
        )

    def of_worker(self, expert: str, worker: str) -> list[UpdateHeld]:
        """What waits of one worker of an expert."""
        return [held for held in self.held.values() if (held.expert, held.worker) == (expert, worker)]

    def digests(self) -> set[str]:
        """The blobs that must stay."""
        return {held.digest for held in self.held.values()}

    def check_room(self, update: UpdateHeld) -> None:
        """Refuse an update that is one too many; nothing of it is kept then."""
        worker = sum(held.worker == update.worker for held in self.held.values())
        if worker >= MOST_OF_A_WORKER:
            raise _full(update, f"{worker} updates of worker {update.worker!r}")
        of_token = [held.size for held in self.held.values() if held.token == update.token]
        if len(of_token) >= MOST_OF_A_TOKEN or sum(of_token) + update.size > max(MOST_BYTES_OF_A_TOKEN, update.size):
            raise _full(update, f"{len(of_token)} updates with {sum(of_token):,} bytes from this token's workers")


def _full(update: UpdateHeld, waiting: str) -> RefusedError:
    return RefusedError(
        "quarantine_full",
        f"{update.reason}; it would be held for an administrator, and {waiting} wait already.",
        "An administrator releases or rejects them ('fedmoe quarantine'); then the same update is taken.",
    )


def _without(updates: Mapping[Identity, Value], key: Identity) -> Mapping[Identity, Value]:
    return MappingProxyType({other: value for other, value in updates.items() if other != key})
