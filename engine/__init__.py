"""Turns requests into tokens; knows nothing of tuning, SQL or gRPC."""
