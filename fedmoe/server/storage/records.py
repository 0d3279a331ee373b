"""Rows of the journal's small tables: tokens, statistics, verdicts of the evaluation gate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Self

import sqlalchemy as sa

#: Made by `fedmoe token create`, by a coordinator at its start, given to it in an environment variable, or older than
#: the table of these facts.
TokenOrigin = Literal["created", "start", "given", "unknown"]


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What the journal knows of a token: its hash and what it may do, never the token.

    `worker` and `experts` None mean any; `expires_at` is seconds since 1970, None never.
    """

    hash: str
    role: str
    worker: str | None = None
    experts: tuple[str, ...] | None = None
    expires_at: float | None = None
    revoked: bool = False

    def to_row(self) -> dict[str, object]:
        return asdict(self) | {"experts": json.dumps(self.experts) if self.experts is not None else None}

    @classmethod
    def of_row(cls, row: sa.RowMapping) -> Self:
        experts = tuple(json.loads(row["experts"])) if row["experts"] is not None else None
        return cls(**{**row, "experts": experts})


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """One token's facts; times are seconds since 1970, `used_from` is the address it was last used from."""

    hash: str
    label: str
    origin: TokenOrigin
    made_at: float | None
    used_at: float | None = None
    used_from: str | None = None


@dataclass(frozen=True, slots=True)
class DataStatistic:
    """Statistics of a worker's data (`kind` is prompts or moments): the digest of the blob that holds them, its bytes.

    A later one of the same expert, worker and kind takes the place of an earlier one; one of no size erased it.
    """

    expert: str
    worker: str
    kind: str
    digest: str
    size: int
    at: float


@dataclass(frozen=True, slots=True)
class Statistic:
    """A small fact a worker chose to send (for example a held-out loss), kept like an update."""

    expert: str
    worker: str
    kind: str
    payload: Mapping[str, object]
    at: float

    def to_row(self) -> dict[str, object]:
        """The columns of a row; raises ValueError for numbers that JSON cannot hold."""
        return asdict(self) | {"payload": json.dumps(dict(self.payload), allow_nan=False)}


@dataclass(frozen=True, slots=True)
class StoredStatistic:
    """A statistic as a row: its number, which rises, the statistic, and the bytes of its values as JSON."""

    id: int
    statistic: Statistic
    size: int

    @classmethod
    def of_row(cls, row: sa.RowMapping) -> Self:
        statistic = Statistic(row["expert"], row["worker"], row["kind"], json.loads(row["payload"]), row["at"])
        return cls(row["id"], statistic, len(row["payload"]))


@dataclass(frozen=True, slots=True)
class GatewayVerdict:
    """One verdict; `digest` names the blob of the gateway that it published, None where the old one stayed.

    `at` is seconds since 1970.
    """

    digest: str | None
    payload: Mapping[str, object]
    at: float

    def to_row(self) -> dict[str, object]:
        """The verdict as a row; raises ValueError for numbers that JSON cannot hold."""
        return {"digest": self.digest, "payload": json.dumps(dict(self.payload), allow_nan=False), "at": self.at}

    @classmethod
    def of_row(cls, row: sa.RowMapping) -> Self:
        """The verdict that `to_row` wrote."""
        return cls(row["digest"], json.loads(row["payload"]), row["at"])
