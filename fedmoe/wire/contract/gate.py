"""Messages between the evaluation gate and evaluators."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from fedmoe.wire.contract.messages import (
    NO_OTHER_KEYS,
    NUMBER,
    Count,
    ExpertName,
    Message,
    Sha256,
    ShortText,
    WorkerName,
)

SetId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
# A base model that guesses among 2^32 tokens loses 22 nats; far more is no loss but a mistake.
Loss = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False), NUMBER]
#: Tokens that one evaluator can claim to have scored.
MAX_TOKENS = 1 << 40
#: Candidates in one set; every one costs each owner a pass over the held-out data.
MAX_CANDIDATES = 16


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
