"""The tables of what was let go of, and of what is to be erased; `let_go` reads and writes them."""

from __future__ import annotations

import sqlalchemy as sa

_TABLES = sa.MetaData()
LET_GO = sa.Table(
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
TO_ERASE = sa.Table(
    "to_erase",
    _TABLES,
    sa.Column("expert", sa.Text, primary_key=True),
    sa.Column("worker", sa.Text, primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
