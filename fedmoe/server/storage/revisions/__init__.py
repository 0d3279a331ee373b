"""Revisions of the journal's schema in PostgreSQL, one a file, run by Alembic in the order that they name."""
