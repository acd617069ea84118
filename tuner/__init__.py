"""Decides, never measures; no clock, no I/O."""
