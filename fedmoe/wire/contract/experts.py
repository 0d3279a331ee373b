"""Messages about experts, the gateway made of them, and its evaluation gate."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, Field, StringConstraints

from fedmoe.wire.contract.messages import (
    NO_OTHER_KEYS,
    NUMBER,
    Count,
    ExpertName,
    HistoryMessage,
    Incarnation,
    Message,
    Sha256,
    ShortText,
    SparseMessage,
    WorkerName,
)

SetId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
# A base model that guesses among 2^32 tokens loses 22 nats; far more is no loss but a mistake.
Loss = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False), NUMBER]
#: Tokens that one evaluator can claim to have scored.
MAX_TOKENS = 1 << 40
#: Candidates in one set; every one costs each owner a pass over the held-out data.
MAX_CANDIDATES = 16


class GateInfo(Message):
    """The evaluation gate: why the newest verdict was as it was (empty: none yet), when, and what it waits for now.

    `undecided`: time was over before all scores were there, so the old gateway stayed. `at` is seconds since 1970;
    `evaluators` are those heard of lately, as EVALUATOR/EXPERT.
    """

    reason: str
    at: float | None
    undecided: bool = False
    status: str
    evaluators: list[str]


class BranchPointInfo(Message):
    """Where an expert branched from the gateway: after which merge, as which version, and the steps trained since."""

    gateway: int
    version: int
    steps: int


class OnlineGatewayInfo(Message):
    """An online gateway: its merges so far, what the last one took, and how far each expert is from it.

    `staleness` is how many merges behind each expert of the last merge was, `seconds` what computing it took.
    """

    folds: int
    staleness: dict[str, int]
    seconds: float
    departures: dict[str, BranchPointInfo]


class GatewayInfo(Message):
    """The gateway: what it is made of and what a rank cut lost.

    `truncation_error` and `digest` come with the merge, which waits until somebody asks for the weights, or for this
    with `merged`; they are null until then, and so are rank, shapes and numbers where the merge chooses the rank.
    `statistics` are the sha256 of the input moments it was made with, by expert, `statistics_tokens` how many tokens
    those of each expert rest on; `notes` say where it was not made as configured; `gate` is null
    without an evaluation gate. `source_digests` are the content hashes of the `sources`, where they are known;
    `left_out` says of experts that are no part of it why not.
    """

    version: int
    strategy: str
    rank: int | None = None
    parameters: int | None = None
    modules: int | None = None
    lora_A_shape: tuple[int, int] | None = None
    lora_B_shape: tuple[int, int] | None = None
    sources: dict[str, int]
    weights: dict[str, float]
    truncation_error: float | None = None
    digest: Sha256 | None = None
    statistics: dict[str, Sha256] = {}
    statistics_tokens: dict[str, int] = {}
    notes: list[str] = []
    scale: float = 1.0
    gate: GateInfo | None = None
    living: OnlineGatewayInfo | None = None
    source_digests: dict[str, Sha256] = {}
    incarnation: Incarnation | None = None
    left_out: dict[str, str] = {}


class CandidatesRequest(Message):
    """Who asks for gateways to score, and whose domain the held-out data are of."""

    evaluator: WorkerName
    expert: ExpertName


class CandidateInfo(Message):
    """A gateway to score: the adapter that `digest` names, its product multiplied with `scale`."""

    name: ShortText
    strategy: str
    scale: float
    digest: Sha256


class CandidateSetInfo(Message):
    """What is to be scored together: base model, own expert, published gateway (null: none) and candidates.

    Every adapter is named by its digest; `seconds_left` until the set is left undecided.
    """

    id: SetId
    version: int
    sources: dict[str, int]
    own: Sha256
    published: Sha256 | None
    candidates: list[CandidateInfo]
    seconds_left: float


class CandidatesAnswer(Message):
    """The set that waits for the asker's scores; `open` is null where there is none, and `status` says why."""

    open: CandidateSetInfo | None
    status: str


class CandidateWeightsRequest(Message):
    """Which adapter of which set."""

    set: SetId
    digest: Sha256


class GatewayScores(Message):
    """Mean held-out losses in nats per token, all on the same `tokens` tokens; `candidates` by name."""

    set: SetId
    evaluator: WorkerName
    expert: ExpertName
    tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), NUMBER]
    base: Loss
    own: Loss
    published: Loss | None
    candidates: Annotated[
        dict[ShortText, Loss], Field(min_length=1, max_length=MAX_CANDIDATES, json_schema_extra=NO_OTHER_KEYS)
    ]


class ScoresResult(Message):
    """The scores were taken; `waiting_for` are evaluators, as EVALUATOR/EXPERT, that have not sent theirs yet."""

    waiting_for: list[str]


class VerdictsRequest(Message):
    """How many of the newest verdicts."""

    limit: Annotated[Count, Field(ge=1, le=100)] = 20


class VerdictInfo(Message):
    """One verdict: what the set was made of, what each gateway keeps of every domain's gain, and the scores.

    `published` is the name of the candidate that went out, null where the old gateway stayed; `undecided` says that it
    stayed because time was over before all scores were there. `at` is seconds since 1970.
    """

    at: float
    version: int
    published: str | None
    undecided: bool = False
    reason: str
    kept: dict[str, dict[str, float]]
    scores: list[GatewayScores]


class VerdictsAnswer(Message):
    """The newest verdicts, the newest first."""

    verdicts: list[VerdictInfo]


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

    `more` says that others follow the last one.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"more"})
    experts: list[ExpertInfo]
    gateway: GatewayInfo | None
    enable_gateway: bool
    more: bool = False


class GatewayInfoRequest(BaseModel):
    """With `merged` the gateway is merged first where it was not, so that rank, shapes and digest are told."""

    merged: bool = False


class ListingRequest(BaseModel):
    """Which experts: those after the name `after`, at most `limit`, with retired ones if wanted.

    With `held_out` each worker's newest held-out loss is added, with `flags` what an administrator should look at.
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
