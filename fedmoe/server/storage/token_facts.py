"""Facts about tokens beside their rights: label, origin, last use."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import sqlalchemy as sa

#: Made by `fedmoe token create`, by a coordinator at its start, given to it in an environment variable, or older than
#: this table.
TokenOrigin = Literal["created", "start", "given", "unknown"]

TOKEN_FACTS = sa.Table(
    "token_facts",
    sa.MetaData(),
    sa.Column("hash", sa.Text, primary_key=True),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("origin", sa.Text, nullable=False),
    sa.Column("made_at", sa.Float),
    sa.Column("used_at", sa.Float),
    sa.Column("used_from", sa.Text),
)


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """One token's facts; times are seconds since 1970, `used_from` is the address it was last used from."""

    hash: str
    label: str
    origin: TokenOrigin
    made_at: float | None
    used_at: float | None = None
    used_from: str | None = None

    def to_row(self) -> dict[str, object]:
        return asdict(self)
