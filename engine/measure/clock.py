"""How long work takes on a device: CUDA events there, a clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch

from sparsed.engine.kvcache.streams import timer

NUM_WARM_UPS: Final = 3
NUM_REPEATS: Final = 15
CPU_REPEATS: Final = 5
HIDE_CYCLES: Final = 4_000_000  # two milliseconds: the work is queued by the time they are over
GRAPH_BELOW_S: Final = 500e-6  # launches from Python can take nearly as long
MAX_RUNS: Final = 2 * (NUM_WARM_UPS + NUM_REPEATS)  # of the same work: as it is, and as a graph

Work = Callable[[], object]


class Clock:
    """Times work on the current stream of one device; with a busy device its times are wrong. On a
    CUDA device each median is of ``repeats`` runs, after ``warm_ups``."""

    def __init__(
        self,
        device: torch.device,
        *,
        warm_ups: int = NUM_WARM_UPS,
        repeats: int = NUM_REPEATS,
    ) -> None:
        self.device = device
        self._warm_ups = warm_ups
        self._repeats = repeats

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median_s(self, work: Work, *, before: Work | None = None) -> float:
        """Median seconds of ``work``, after runs that compile and warm up. On a CUDA device from
        its first operation to its last, which the host has queued before. ``before`` is done ahead
        of every run, and not timed."""
        is_cuda = self.device.type == "cuda"
        once_s, repeats = (_on_device_s, self._repeats) if is_cuda else (_on_host_s, CPU_REPEATS)
        before = before or _nothing
        for _ in range(self._warm_ups if is_cuda else 1):
            before()
            work()
        self.synchronize()
        return statistics.median(once_s(work, before) for _ in range(repeats))

    def each_s(
        self,
        works: Sequence[Work],
        *,
        before: Work | None = None,
        capture: bool = True,
        graph_below_s: float = GRAPH_BELOW_S,
    ) -> float:
        """Seconds of one of ``works`` on average: all of them run in turn, so that none finds its
        inputs in a cache if together they are larger than it. Those below ``graph_below_s`` run
        as one graph, unless ``capture`` is false; what is many short operations takes as long as
        their launches otherwise. ``before`` is done ahead of every turn of all of them, and is in
        no graph."""

        def run_all() -> list[object]:
            return [work() for work in works]  # kept until the end: no two share memory

        total_s = self.median_s(run_all, before=before)
        if capture and self.device.type == "cuda" and total_s / len(works) < graph_below_s:
            total_s = self.median_s(_capture(run_all).replay, before=before)
        return total_s / len(works)


def _capture(work: Work) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _nothing() -> None:
    pass


def _on_host_s(work: Work, before: Work) -> float:
    before()
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def _on_device_s(work: Work, before: Work) -> float:
    begin, end = timer(), timer()
    torch.cuda._sleep(HIDE_CYCLES)  # type: ignore[no-untyped-call]  # torch's
    before()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
