"""The table of what was let go of; `let_go` reads and writes it."""

from __future__ import annotations

import sqlalchemy as sa

LET_GO = sa.Table(
    "let_go",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("expert", sa.Text, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("through", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
