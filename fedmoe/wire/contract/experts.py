"""Messages that list, rename and retire experts, and page through statistics."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints

from fedmoe.wire.contract.messages import Count, ExpertName, Message, ShortText, WorkerName


class ListingRequest(BaseModel):
    """Which experts: those after the name `after`, at most `limit`, with retired ones if wanted.

    With `held_out` each worker's newest held-out loss is told, with `flags` what to look at of it.
    """

    held_out: bool = False
    flags: bool = False
    retired: bool = False
    after: Annotated[str, StringConstraints(max_length=64)] = ""
    limit: Annotated[int, Field(ge=1, le=1000)] = 1000


class StatisticsRequest(Message):
    """Which statistics: from the one after number `after` on, at most `limit`."""

    expert: ExpertName | None = None
    worker: WorkerName | None = None
    kind: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")] | None = None
    after: Count = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 1000


class RenameRequest(Message):
    """Give an expert another name; its former ones still mean it."""

    expert: ExpertName
    name: ExpertName


class RetireRequest(Message):
    """Take an expert out of the gateway and refuse updates of it; what it is stays."""

    expert: ExpertName
    reason: ShortText = ""


class UnretireRequest(Message):
    """Bring a retired expert back as it was."""

    expert: ExpertName
