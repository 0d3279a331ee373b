"""Tables of released bytes and of requested erasures."""

from __future__ import annotations

import sqlalchemy as sa

_TABLES = sa.MetaData()
RELEASED_BYTES = sa.Table(
    "let_go",
    _TABLES,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("expert", sa.Text, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("through", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
#: Erasures that were asked for and are not finished.
ERASURE_REQUESTS = sa.Table(
    "to_erase",
    _TABLES,
    sa.Column("expert", sa.Text, primary_key=True),
    sa.Column("worker", sa.Text, primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
