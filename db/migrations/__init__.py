"""Alembic revisions, numbered, forward only, never edited after release."""
