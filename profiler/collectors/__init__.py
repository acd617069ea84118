"""One collector per source of truth."""
