"""Measures what ``in_place`` decides by: how much longer recorded steps of nobody take if they
select. Each graph is timed where it is recorded, so that whatever graphs there are, at a start and
after a change of knobs, are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from sparsed.core import SparseMethod
from sparsed.engine.in_place import InPlaceRule, Overhead
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.recorder import Recorded
from sparsed.engine.step_graphs import GraphKey

MANY_PAGES: Final = 4096  # a request of 32k in pages of 8; time grows evenly beyond
FEW_OF_MANY: Final = 16
WARM_UPS: Final = 1  # of each time: the graph has just been recorded
REPEATS: Final = 5  # a request may be waiting


class Times(Protocol):
    """How long work takes; ``measure.clock.Clock`` is one."""

    def median_s(self, work: Callable[[], object]) -> float: ...


class OverheadMeter:
    """Teaches ``rule`` the overheads of graphs, of requests of up to ``max_pages`` pages."""

    def __init__(self, rule: InPlaceRule, times: Times, *, max_pages: int) -> None:
        self.rule = rule
        self._times = times
        self._many = max(1, min(MANY_PAGES, max_pages - 1))
        self._few = max(1, self._many // FEW_OF_MANY)

    def measure(
        self,
        key: GraphKey,
        graph: Recorded,
        *,
        in_place: Recorded,
        rehearse: Callable[[int], None],
    ) -> None:
        """Time a graph that selects against one of as many requests that attends in place, one
        after the other: what the device's clocks do in the meantime, they do to both.
        ``rehearse(n)`` makes the next steps those of nobody, whose requests have n full pages.
        Waits for the device."""
        rehearse(0)
        in_place_s = self._times.median_s(in_place.replay)
        rehearse(self._few)
        few_s = self._times.median_s(graph.replay) - in_place_s
        rehearse(self._many)
        many_s = self._times.median_s(graph.replay) - in_place_s
        self.rule.learn(key, Overhead(self._few, few_s, self._many, many_s))


def is_of_hot_pages(key: GraphKey) -> bool:
    """Whether steps that select run this graph though all their pages are hot. Beside requests
    that attend in place there is only the graph that fetches, and finds nothing to be fetched."""
    return key.pages > 0 and key.fetches == key.in_place and not key.times


def make_meter(
    geometry: Geometry, times: Times, *, method: SparseMethod, max_pages: int, bytes_per_s: float
) -> OverheadMeter:
    """With a rule that knows no graph yet. ``bytes_per_s`` of a copy in device memory."""
    kv_bytes = geometry.frame_bytes / (geometry.pages_per_block * geometry.page_size)
    summary_bytes = geometry.summary_bytes_per_frame(method) / geometry.pages_per_block
    rule = InPlaceRule(
        token_bytes=round(kv_bytes),
        summary_bytes=summary_bytes,
        page_size=geometry.page_size,
        bytes_per_s=bytes_per_s,
    )
    return OverheadMeter(rule, times, max_pages=max_pages)
