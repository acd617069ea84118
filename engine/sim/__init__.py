"""Recorded selections of pages against caches that might hold them; numpy, no device."""
