"""Messages about what goes on: heartbeats of workers, and the state of a whole federation at one moment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from fedmoe.wire.contract.experts import GateInfo, HeldOutInfo, Loss
from fedmoe.wire.contract.messages import NUMBER, VISIBLE, Count, ExpertName, Message, ShortText, WorkerName

#: What a worker says of itself; and one that says nothing for longer than it announced.
OwnState = Literal["loading", "training", "left"]
WorkerState = Literal["loading", "training", "silent", "left"]
#: The newest lines of its log that a worker's heartbeat carries, and the longest of them.
MOST_LINES, LONGEST_LINE = 50, 500
LogLine = Annotated[str, StringConstraints(max_length=LONGEST_LINE, pattern=VISIBLE)]
_Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False), NUMBER]
_Rate = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False), NUMBER]
_Whole = Annotated[Count, NUMBER]


class Heartbeat(Message):
    """What a worker does now; kept in memory only, never journalled.

    `phase` says what a loading worker is at, `steps` how many there will be in all (null: without an end). The next
    one comes within `interval` seconds. `memory` is what the process holds, `device_memory` of `device_total` what all
    processes hold of its GPU, in bytes. `lines` are those of its log since the last one, numbered from `first_line` on.
    """

    expert: ExpertName
    worker: WorkerName
    state: OwnState
    interval: _Seconds
    phase: ShortText = ""
    step: _Whole = 0
    steps: _Whole | None = None
    steps_per_second: _Rate | None = None
    tokens_per_second: _Rate | None = None
    loss: Loss | None = None
    device: ShortText = ""
    memory: _Whole | None = None
    device_memory: _Whole | None = None
    device_total: _Whole | None = None
    first_line: _Whole = 0
    lines: Annotated[list[LogLine], Field(max_length=MOST_LINES)] = []


class PushTotals(Message):
    """A worker's pushes: landed since its first one; held and refused since the coordinator's start."""

    landed: int
    held: int = 0
    refused: int = 0
    refusal: str = ""


class WorkerStatus(Message):
    """A worker of an expert: what it last said of itself, and what became of its pushes.

    `heard_at` is its newest push or heartbeat, in seconds since 1970; `seconds_left` until its last step at the present
    pace. `state` is null for one that has sent no heartbeat since the coordinator's start, as older programs do.
    """

    expert: ExpertName
    worker: WorkerName
    state: WorkerState | None
    phase: str = ""
    step: int | None = None
    steps: int | None = None
    seconds_left: float | None = None
    tokens_per_second: float | None = None
    loss: float | None = None
    held_out: HeldOutInfo | None = None
    staleness: int | None = None
    device: str = ""
    memory: int | None = None
    device_memory: int | None = None
    device_total: int | None = None
    heard_at: float
    pushes: PushTotals


class LossPoint(Message):
    """A loss at a moment, nats per token: of training, or held out by the worker itself."""

    at: float
    version: int
    training: float | None = None
    held_out: float | None = None


class ExpertStatus(Message):
    """An expert: `updates_per_minute` and mean `staleness` of the last minutes, `losses` the oldest first.

    `gain_kept` is the share of its gain on its own domain that the served gateway kept at the newest verdict of the
    evaluation gate, null where no evaluator scored it.
    """

    name: ExpertName
    version: int
    retired: bool
    workers: int
    updates_per_minute: float
    staleness: float | None
    gain_kept: float | None = None
    losses: list[LossPoint]


class GatewayStatus(Message):
    """The gateway that is served, and the versions of what it is made of."""

    version: int
    strategy: str
    sources: dict[str, int]


class DiskStatus(Message):
    """Where updates are stored: bytes they take, bytes free, what an hour adds now, and how long the room lasts."""

    stored: int
    free: int | None
    bytes_per_hour: float
    hours_left: float | None


class EventInfo(Message):
    """Something that happened to the federation; `at` in seconds since 1970."""

    id: int
    at: float
    kind: str
    expert: str = ""
    worker: str = ""
    text: str = ""


class StatusInfo(Message):
    """A federation at the moment `at`, as far as the token, of this `role`, may see it; `revision` rises by change.

    `gateway` is null while there is none, `gate` without an evaluation gate, `disk` for all but administrators and
    viewers.
    """

    at: float
    role: str
    revision: int
    fedmoe: str
    incarnation: str
    problem: str | None
    experts: list[ExpertStatus]
    workers: list[WorkerStatus]
    gateway: GatewayStatus | None
    gate: GateInfo | None = None
    held_updates: int
    disk: DiskStatus | None
    events: list[EventInfo]


class WorkerLogRequest(Message):
    """Which worker's log lines: those from number `after` on."""

    worker: WorkerName
    expert: ExpertName | None = None
    after: Count = 0


class WorkerLog(Message):
    """Lines of a worker's log, the oldest first, and the number to ask from next; earlier ones may be gone."""

    lines: list[str]
    next: int
    state: WorkerState | None
