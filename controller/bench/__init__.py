"""Benchmarks that run from the command line: load on a server, measured from outside."""
