"""Messages for administrators, about tokens and updates in quarantine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from fedmoe.wire.contract.messages import NUMBER, VISIBLE, EpochName, ExpertName, Message, Sha256, ShortText, WorkerName

TokenLabel = Annotated[str, StringConstraints(max_length=60, pattern=VISIBLE)]
#: The role of the token of a join line.
INVITE = "invite"
#: How long a join line is good for where nobody says: a week.
JOIN_LINE_SECONDS = 7 * 86_400.0
Number = Annotated[int, Field(ge=1, le=2**53)]


class TokenRequest(Message):
    """A new token; `worker` and `experts` narrow what it may do, `expires_in` is seconds from now.

    With the role `invite` it is the token of a join line: it can only be exchanged, once, for one of a worker.
    """

    role: Literal["worker", "join", "admin", "viewer", "invite"] = "worker"
    worker: WorkerName | None = None
    experts: list[ExpertName] | None = None
    expires_in: Annotated[float, Field(gt=0, le=10 * 365 * 86400, allow_inf_nan=False), NUMBER] | None = None
    label: TokenLabel = ""


class TokenAnswer(Message):
    """A token in clear, shown once; `hash` names it when it is to be revoked."""

    token: str
    hash: Sha256


class JoinRequest(Message):
    """The token that a worker made for itself, as its SHA-256, and the worker that it is to belong to."""

    token_hash: Sha256
    worker: WorkerName


class JoinAnswer(Message):
    """What the worker's own token may do from now on; `experts` null means any."""

    worker: WorkerName
    experts: list[ExpertName] | None


class TokenInfo(Message):
    """A token without what it is: whose it is, what it may do, and when it was used.

    `origin` is `created` (by an administrator), `start` (made at a coordinator's start), `given` (from its
    environment), `joined` (for a join line) or `unknown` (of an older program). Times are seconds since 1970, null
    where there is none; `used_at` may lag behind a crash by a minute.
    """

    hash: Sha256
    label: str
    role: str
    worker: str | None
    experts: list[str] | None
    origin: str
    made_at: float | None
    used_at: float | None
    used_from: str | None
    expires_at: float | None
    revoked: bool
    usable: bool


class TokenListing(Message):
    """All tokens there ever were, the oldest first."""

    tokens: list[TokenInfo]


class RevokeRequest(Message):
    """Which token to revoke, by its hash."""

    hash: Sha256


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
    """Never let the held update of this number land; its worker gets the reason."""

    number: Number
    reason: ShortText = ""
