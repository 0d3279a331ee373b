"""Messages that list, rename and retire experts, and page through statistics."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, Field, StringConstraints

from fedmoe.wire.contract.gateway import GatewayInfo
from fedmoe.wire.contract.messages import (
    Count,
    ExpertName,
    HistoryMessage,
    Message,
    Sha256,
    ShortText,
    SparseMessage,
    WorkerName,
)


class HeldOutInfo(Message):
    """A worker's loss on held-out data of its own, nats per token: after which step, the first one, the lowest."""

    step: int
    loss: float
    first: float
    best: float
    tokens: int


class WorkerInfo(SparseMessage):
    """What the coordinator last heard from a worker of an expert; `seconds_ago` since its last accepted update.

    `held_out` is there if the caller asked for it and the worker measures itself, `flags` if the caller asked and an
    administrator should look; else these keys are not sent, since older programs refuse keys that they do not know.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"held_out", "flags"})
    worker: WorkerName
    updates: int
    staleness: int
    loss: float | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds_ago: float
    held_out: HeldOutInfo | None = None
    flags: list[str] = []


class ExpertInfo(HistoryMessage):
    """One expert in a listing; `digest` is the content hash of its weights.

    `prompts` names the prompt statistics that `GET /data_statistics` gives for it; null while no worker has sent any.
    `formerly` are names that it had before and that still mean it; `retired` that it takes no updates. Both are left
    out where there is nothing to tell.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"incarnation", "formerly", "retired"})
    name: ExpertName
    version: int
    rank: int
    alpha: float
    parameters: int
    base: str
    digest: Sha256
    workers: list[WorkerInfo] = []
    prompts: Sha256 | None = None
    formerly: list[ExpertName] = []
    retired: bool = False


class ExpertListing(SparseMessage):
    """A page of experts in name order and the gateway, which is null while there is none or it is switched off.

    `more` tells that others follow the last one.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"more"})
    experts: list[ExpertInfo]
    gateway: GatewayInfo | None
    enable_gateway: bool
    more: bool = False


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
