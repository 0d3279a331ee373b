"""The first revision: the tables of schema 2, and the seals of their rows."""

from __future__ import annotations

import sqlalchemy as sa

revision = "first"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    from alembic import op  # only where the extra `postgres` is installed

    op.create_table("meta", _key("key"), _text("value", nullable=True))
    op.create_table(
        "events",
        _id(),
        *(_text(name) for name in ("kind", "expert")),
        _number("version"),
        *(_text(name, nullable=True) for name in ("worker", "epoch")),
        _number("sequence", nullable=True),
        _text("digest", nullable=True),
        _text("payload"),
        _text("version_digest", nullable=True),
        sa.Column("chain", sa.Text, nullable=False, server_default=""),
        sa.UniqueConstraint("worker", "epoch", "sequence"),
        sa.UniqueConstraint("expert", "version"),
    )
    version = sa.Column("version", sa.BigInteger, primary_key=True)
    op.create_table("snapshots", _key("expert"), version, _text("digest"))
    op.create_table(
        "statistics", _id(), *(_text(name) for name in ("expert", "worker", "kind", "payload")), _time("at")
    )
    op.create_table(
        "tokens",
        _key("hash"),
        _text("role"),
        *(_text(name, nullable=True) for name in ("worker", "experts")),
        _time("expires_at", nullable=True),
        sa.Column("revoked", sa.Boolean, nullable=False),
    )
    op.create_table(
        "token_facts",
        _key("hash"),
        *(_text(name) for name in ("label", "origin")),
        *(_time(name, nullable=True) for name in ("made_at", "used_at")),
        _text("used_from", nullable=True),
    )
    op.create_table(
        "data_statistics",
        _id(),
        *(_text(name) for name in ("expert", "worker", "kind", "digest")),
        _number("size"),
        _time("at"),
    )
    op.create_table("gateway_verdicts", _id(), _text("digest", nullable=True), _text("payload"), _time("at"))
    op.create_table(
        "let_go",
        _id(),
        _text("expert"),
        _text("worker", nullable=True),
        _number("through"),
        _text("reason"),
        _time("at"),
    )
    op.create_table("to_erase", _key("expert"), _key("worker"), _text("reason"), _time("at"))
    op.create_table("seals", _key("place"), _key("row"), _text("seal"))


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=True)


def _key(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text, primary_key=True)


def _text(name: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=nullable)


def _number(name: str, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=nullable)


def _time(name: str, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Float, nullable=nullable)
