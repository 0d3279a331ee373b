"""Messages about updates in quarantine."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedmoe.wire.contract.messages import EpochName, ExpertName, Message, Sha256, ShortText, WorkerName

Number = Annotated[int, Field(ge=1, le=2**53)]


class HeldUpdateInfo(Message):
    """An update that waits for an administrator; `norm` is null where it was held unread, `at` seconds since 1970."""

    number: int
    expert: ExpertName
    worker: WorkerName
    epoch: EpochName
    sequence: int
    base_version: int
    digest: Sha256
    bytes: int
    norm: float | None
    reason: str
    at: float
    seconds_ago: float


class QuarantineListing(Message):
    """All that is held, the oldest first."""

    held: list[HeldUpdateInfo]


class ReleaseRequest(Message):
    """Let the held update of this number land."""

    number: Number


class RejectRequest(Message):
    """Never let the held update of this number land; its worker is told the reason."""

    number: Number
    reason: ShortText = ""
