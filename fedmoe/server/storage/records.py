"""Rows of the journal's small tables: tokens, statistics, verdicts of the evaluation gate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import sqlalchemy as sa

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R")

#: Made by `fedmoe token create`, by a coordinator at its start, given to it in an environment variable, exchanged for
#: the token of a join line, or older than the table of these facts.
TokenOrigin = Literal["created", "start", "given", "joined", "unknown"]


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


@dataclass(frozen=True, slots=True)
class StoredStatistic:
    """A statistic as a row: its number, which rises, the statistic, and the bytes of its values as JSON."""

    id: int
    statistic: Statistic
    size: int


@dataclass(frozen=True, slots=True)
class GatewayVerdict:
    """One verdict; `digest` names the blob of the gateway that it published, None where the old one stayed.

    `at` is seconds since 1970.
    """

    digest: str | None
    payload: Mapping[str, object]
    at: float


# Columns that hold JSON.
_JSON = ("experts", "payload")


def to_row(record: DataclassInstance) -> dict[str, Any]:
    """The columns of a record; raises ValueError for numbers that JSON cannot hold."""
    row = asdict(record)
    return row | {name: json.dumps(row[name], allow_nan=False) for name in _JSON if row.get(name) is not None}


def of_row(kind: type[R], row: sa.RowMapping) -> R:
    """The record that `to_row` wrote; a row's own number is left out."""
    values: dict[str, Any] = {name: value for name, value in row.items() if name != "id"}
    for name in _JSON:
        if values.get(name) is not None:
            values[name] = json.loads(values[name])
    if isinstance(values.get("experts"), list):
        values["experts"] = tuple(values["experts"])
    return kind(**values)
