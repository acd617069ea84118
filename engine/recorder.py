"""Steps recorded as CUDA graphs, to be run again by one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparsed.engine.kvcache.streams import new_stream


class Drawn(NamedTuple):
    """Logits (n, V) float32 of the rows that ran, and the token drawn from each (n,)."""

    logits_NV: Tensor
    tokens_N: Tensor


class Recorded(NamedTuple):
    """``replay`` queues a step once more, which leaves its results in ``drawn``."""

    replay: Callable[[], None]
    drawn: Drawn


class Recorder(Protocol):
    """How a step becomes something to run again; ``CudaRecorder`` is one."""

    def record(self, run: Callable[[], Drawn]) -> Recorded: ...
    def settle(self) -> None:
        """Wait until nothing that was recorded runs any more."""
        ...


class CudaRecorder:
    """Graphs that share the memory of what they compute on the way: only one runs at a time.

    Captured on a stream of ``device``: that of torch's own choice stays on the first device that a
    process captured on.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = new_stream(device)

    def record(self, run: Callable[[], Drawn]) -> Recorded:
        """Run a step, then capture it. Waits for the device."""
        run()  # compiles kernels and picks products before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _uncollected(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            drawn = run()
        return Recorded(graph.replay, drawn)

    def settle(self) -> None:
        torch.cuda.synchronize()


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection within: an older graph that it frees would end a capture under way."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
