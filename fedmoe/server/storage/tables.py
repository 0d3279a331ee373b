"""The journal's tables, in the order in which they were added."""

from __future__ import annotations

import sqlalchemy as sa

#: 2: rows of events are chained and know the digest of the version they make.
SCHEMA_VERSION = 2
#: Keys of the table `meta`: the identity of the history, and those before as JSON. A new one begins wherever
#: acknowledged changes may have been lost.
INCARNATION = "incarnation"
INCARNATIONS_BEFORE = "incarnations_before"
#: The update rule that every expert's past was made with.
UPDATE_RULE = "update_rule"
#: Where the blobs lie, as JSON: the URL of an object store, and the mark that is in it too. None for the folder.
BLOB_STORE = "blob_store"
#: Where a federation comes from that is being moved here; gone once all of it is here.
MOVED_FROM = "moved_from"
TABLES = sa.MetaData()
#: Tables that were added within a schema: made where they are missing. An older program leaves them alone.
LATER_TABLES = sa.MetaData()


# SQLite's INTEGER has 64 bits, and alone numbers rows by itself.
_INTEGER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _id() -> sa.Column[int]:
    return sa.Column("id", _INTEGER, primary_key=True, autoincrement=True)


def _keys(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, primary_key=True) for name in names]


def _texts(*names: str, nullable: bool = False) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=nullable) for name in names]


def _integer(name: str) -> sa.Column[int]:
    return sa.Column(name, _INTEGER, nullable=False)


def _time(name: str = "at", nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Float, nullable=nullable)


META = sa.Table("meta", TABLES, *_keys("key"), *_texts("value", nullable=True))
EVENTS = sa.Table(
    "events",
    TABLES,
    _id(),
    *_texts("kind", "expert"),
    _integer("version"),
    *_texts("worker", "epoch", nullable=True),
    sa.Column("sequence", _INTEGER),
    *_texts("digest", nullable=True),
    *_texts("payload"),
    # The content hash of the weights that the event leaves behind; none where it leaves the first ones of an expert,
    # or was journalled by schema 1.
    *_texts("version_digest", nullable=True),
    # See `chain.link`.
    sa.Column("chain", sa.Text, nullable=False, server_default=""),
    # An update's identity: the same one can never be in the journal twice, whoever writes.
    sa.UniqueConstraint("worker", "epoch", "sequence"),
    sa.UniqueConstraint("expert", "version"),
)
SNAPSHOTS = sa.Table(
    "snapshots", TABLES, *_keys("expert"), sa.Column("version", _INTEGER, primary_key=True), *_texts("digest")
)
STATISTICS = sa.Table("statistics", TABLES, _id(), *_texts("expert", "worker", "kind", "payload"), _time())
TOKENS = sa.Table(
    "tokens",
    TABLES,
    *_keys("hash"),
    *_texts("role"),
    *_texts("worker", "experts", nullable=True),
    _time("expires_at", nullable=True),
    sa.Column("revoked", sa.Boolean, nullable=False, default=False),
)
DATA_STATISTICS = sa.Table(
    "data_statistics", LATER_TABLES, _id(), *_texts("expert", "worker", "kind", "digest"), _integer("size"), _time()
)
VERDICTS = sa.Table(
    "gateway_verdicts", LATER_TABLES, _id(), *_texts("digest", nullable=True), *_texts("payload"), _time()
)
TOKEN_FACTS = sa.Table(
    "token_facts",
    LATER_TABLES,
    *_keys("hash"),
    *_texts("label", "origin"),
    *(_time(name, nullable=True) for name in ("made_at", "used_at")),
    *_texts("used_from", nullable=True),
)
RELEASED_BYTES = sa.Table(
    "let_go",
    LATER_TABLES,
    _id(),
    *_texts("expert"),
    *_texts("worker", nullable=True),
    _integer("through"),
    *_texts("reason"),
    _time(),
)
#: Erasures that were asked for and are not finished.
ERASURE_REQUESTS = sa.Table("to_erase", LATER_TABLES, *_keys("expert", "worker"), *_texts("reason"), _time())
ALL_TABLES = (*TABLES.sorted_tables, *LATER_TABLES.sorted_tables)
