"""How many threads a model is fitted with: one, whoever asks and in whatever process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@contextmanager
def one_thread() -> Iterator[None]:
    """For the block, the libraries behind numpy and scikit-learn compute on one thread.

    Models of a few dozen points are slower with every further one, and an engine beside them, or
    the daemon, needs the cores. The limit is that of the process: nothing else in it may compute
    meanwhile. Libraries that are first loaded within the block are not limited.
    """
    with _pools().limit(limits=1):
        yield


@cache
def _pools() -> ThreadpoolController:
    """Finding the libraries takes milliseconds, and a suggestion asks a dozen times."""
    return ThreadpoolController()
