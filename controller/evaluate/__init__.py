"""``sparsed eval``: what is asked for, and what a report says."""
