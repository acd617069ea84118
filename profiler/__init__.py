"""Measures, never decides."""
