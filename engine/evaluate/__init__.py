"""Quality of sparse attention on known text, every position at once."""
