"""Remembers: hardware, models, trials and profiles in SQLite."""
