"""The journal's tables, in the order in which they were added."""

from __future__ import annotations

import sqlalchemy as sa

#: 2: rows of events are chained and know the digest of the version they make.
SCHEMA_VERSION = 2
TABLES = sa.MetaData()
META = sa.Table("meta", TABLES, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))
EVENTS = sa.Table(
    "events",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("expert", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("epoch", sa.Text),
    sa.Column("sequence", sa.Integer),
    sa.Column("digest", sa.Text),
    sa.Column("payload", sa.Text, nullable=False),
    # The content hash of the weights that the event leaves behind; none where it leaves the first ones of an expert,
    # or was journalled by schema 1.
    sa.Column("version_digest", sa.Text),
    # See `chain.link`.
    sa.Column("chain", sa.Text, nullable=False, server_default=""),
    # An update's identity: the same one can never be in the journal twice, whoever writes.
    sa.UniqueConstraint("worker", "epoch", "sequence"),
    sa.UniqueConstraint("expert", "version"),
)
SNAPSHOTS = sa.Table(
    "snapshots",
    TABLES,
    sa.Column("expert", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
)
STATISTICS = sa.Table(
    "statistics",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("expert", sa.Text, nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
DATA_STATISTICS = sa.Table(
    "data_statistics",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("expert", sa.Text, nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
TOKENS = sa.Table(
    "tokens",
    TABLES,
    sa.Column("hash", sa.Text, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("experts", sa.Text),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked", sa.Boolean, nullable=False, default=False),
)
