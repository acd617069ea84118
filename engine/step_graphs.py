"""Which recorded graphs a decode step may run, and which are recorded next, between two steps.

Recording a graph takes 50 to 300 ms of a GPU's time, and where it is timed as long as 18 steps, and
there are tens of them, so nothing waits for all: what is there goes on serving, and a change is in
force once its last graph is there. Free of torch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final, Generic, NamedTuple, TypeVar

from sparsed.core import KNOBS_BY_NAME
from sparsed.engine.kvcache.link_policy import CopyChoice

GRAPH_STEPS: Final = ((8, 8), (64, 16), (128, 32), (256, 64))  # from that batch on, in steps of
SLICE_S: Final = 0.005  # of recording between two steps; one graph, if that takes longer
MAX_BUDGET: Final = int(KNOBS_BY_NAME["token_budget"].maximum or 0)
IN_PLACE: Final = (True, False, False)  # as in GraphKey
SELECTING: Final = (
    (False, False, False),
    (False, True, False),
    (False, True, True),
    (True, True, False),
    (True, True, True),
)

Graph = TypeVar("Graph")


class GraphKey(NamedTuple):
    """What a graph is for: a batch size; the most pages that one of its requests selects, 0 where
    none does; whether some attend to all their tokens in place, whether pages may have to be
    fetched, and whether that is timed. ``load``: how they are fetched, None where none is.
    ``keeps``: whether selections are kept for steps that do not rank."""

    size: int
    pages: int
    in_place: bool
    fetches: bool
    times: bool
    load: CopyChoice | None
    keeps: bool = False


class GraphTarget(NamedTuple):
    """What there are to be graphs of. ``counts``, rising: pages that a request with the budget of
    the knob selects, then with larger budgets of its own; none where nothing is selected.
    ``keeps``: as in ``GraphKey``."""

    counts: tuple[int, ...]
    load: CopyChoice
    keeps: bool = False


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes with a graph of their own: each step pads little, and there are not many."""
    sizes = {1, 2, 4, max_rows}
    for (first, step), (last, _) in pairwise((*GRAPH_STEPS, (max_rows, 0))):
        sizes |= set(range(first, min(last, max_rows) + 1, step))
    return sorted(size for size in sizes if size <= max_rows)


def most_pages(*, page_size: int, max_tokens: int) -> int:
    """Full pages that the largest budget selects of a request of ``max_tokens``, at most."""
    return max(1, min(MAX_BUDGET // page_size - 1, max_tokens // page_size))


def ladder(token_budget: int, *, page_size: int, max_tokens: int) -> tuple[int, ...]:
    """Pages selected under a budget of the knob, twice that and so on, up to the largest."""
    most, counts = most_pages(page_size=page_size, max_tokens=max_tokens), []
    while (count := token_budget // page_size - 1) < most:
        counts.append(count)
        token_budget *= 2
    return (*counts, most)


class StepGraphs(Generic[Graph]):
    """The graphs there are, and those to come.

    Of the first count there are graphs for all ``sizes`` (rising). Those of larger counts come once
    a step has to do without, and for few sizes: a step pads more there, and memory is for pages.
    ``record`` None: never any graph, and nothing is waited for. ``settle`` returns when no graph
    runs any more, so that some may be given up. One thread.
    """

    def __init__(
        self,
        target: GraphTarget,
        *,
        sizes: Sequence[int],
        record: Callable[[GraphKey], Graph] | None,
        settle: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._sizes = tuple(sizes)
        self._few_sizes = tuple(s for s in sizes if s.bit_count() == 1 or s == sizes[-1])
        self._record = record
        self._settle = settle
        self._clock = clock
        self._now = self._next = target
        self._graphs: dict[GraphKey, Graph] = {}
        self._missed: set[int] = set()  # counts whose graphs a step had to do without
        self._queue: deque[GraphKey] = deque()
        self._num_planned = 0
        self._rest_until_s = float("-inf")
        self._plan()

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def is_recording(self) -> bool:
        """Whether graphs are still to come."""
        return bool(self._queue)

    @property
    def is_ready(self) -> bool:
        """Whether all that was asked for may come into force: steps find their graphs then."""
        return self._next == self._now or not self._queue

    @property
    def progress(self) -> float:
        """How much of what is to be recorded is there, 0 to 1."""
        return 1.0 - len(self._queue) / max(1, self._num_planned)

    def ask(self, target: GraphTarget) -> None:
        """Get ready for ``target``; what was asked for before is forgotten, what is in force stays.
        From now on ``record`` must launch as ``target.load`` says."""
        self._next = target
        self._plan()
        self._drop()

    def switch(self) -> None:
        """What was asked for comes into force."""
        assert self.is_ready
        self._now = self._next
        self._missed &= set(self._now.counts)
        self._plan()
        self._drop()

    def advance(self, *, idle: bool) -> None:
        """Record what a pause between two steps has room for. Unless ``idle``, no more than half of
        the time goes into it: after each pause steps have as long to themselves."""
        if not self._queue or (not idle and self._clock() < self._rest_until_s):
            return
        assert self._record is not None
        started_s = now_s = self._clock()
        while self._queue and now_s < started_s + SLICE_S:
            key = self._queue.popleft()
            self._graphs[key] = self._record(key)
            now_s = self._clock()
        self._rest_until_s = 2 * now_s - started_s
        if not self._queue:
            self._drop()

    def find(
        self, num_rows: int, *, count: int, in_place: bool, fetches: bool, times: bool = False
    ) -> tuple[GraphKey, Graph | None]:
        """The graph for a step of ``num_rows``, that selects ``count`` pages at most: of the least
        size and count that is there, and timed where it is there so. None: it has to be launched by
        itself, as the key says."""
        key, graph = self._find(num_rows, count=count, in_place=in_place, fetches=fetches)
        timed = key._replace(times=times)
        if graph is not None and timed not in self._graphs:
            return key, graph
        return timed, self._graphs.get(timed)

    def _find(
        self, num_rows: int, *, count: int, in_place: bool, fetches: bool
    ) -> tuple[GraphKey, Graph | None]:
        """``find``, of steps that nobody times."""
        load = self._now.load if fetches else None
        rung = next(c for c in self._now.counts if c >= count) if count else 0
        sizes = [size for size in self._sizes if size >= num_rows]
        size = next(size for size in self._sizes_of(rung, self._now) if size >= num_rows)
        keeps = count > 0 and self._now.keeps
        best = GraphKey(size, rung, in_place, fetches, False, load, keeps)
        if best in self._graphs:
            return best, self._graphs[best]
        self._miss(rung)
        counts = sorted({key.pages for key in self._graphs if key.pages >= count}) if count else [0]
        for size in sizes:
            for other in counts:
                key = best._replace(size=size, pages=other)
                if key in self._graphs:
                    return key, self._graphs[key]
        return best._replace(size=sizes[0]), None

    def _miss(self, count: int) -> None:
        if self._record is not None and count and count not in self._missed:
            self._missed.add(count)
            self._plan()

    def _plan(self) -> None:
        """List what is to be recorded: what a change waits for, else what steps do without."""
        if self._record is None:
            return
        in_place = [GraphKey(size, 0, *IN_PLACE, None) for size in reversed(self._sizes)]
        wanted = [key for key in in_place if key not in self._graphs]
        counts = self._counts_waited_for()
        if not counts and self._next == self._now:
            counts = sorted(self._missed)
        for count in counts:
            wanted += self._keys(count, self._next, self._sizes_of(count, self._next))
        self._num_planned = len(wanted)
        self._queue = deque(key for key in wanted if key not in self._graphs)

    def _counts_waited_for(self) -> list[int]:
        """Counts without whose graphs the asked target cannot be in force: the first, unless the
        graphs of a larger one will do, and those in use that load in another way now."""
        now, target = self._now, self._next
        if not target.counts:
            return []
        counts = {key.pages for key in self._graphs if key.load == now.load != target.load}
        if now.keeps != target.keeps:
            counts |= {key.pages for key in self._graphs if key.keeps == now.keeps}
        counts &= set(target.counts)
        if self._serving(target) is None:
            counts.add(target.counts[0])
        return sorted(counts)

    def _serving(self, target: GraphTarget) -> int | None:
        """The least count whose graphs serve all requests with the budget of the knob."""
        for count in sorted({key.pages for key in self._graphs}):
            keys = self._keys(count, target, self._few_sizes)
            if count >= target.counts[0] and all(key in self._graphs for key in keys):
                return count
        return None

    def _keys(self, count: int, target: GraphTarget, sizes: Sequence[int]) -> Iterator[GraphKey]:
        """Of steps that select, the largest first: they share its memory."""
        for size in reversed(sizes):
            for in_place, fetches, times in SELECTING:
                load = target.load if fetches else None
                yield GraphKey(size, count, in_place, fetches, times, load, target.keeps)

    def _sizes_of(self, count: int, target: GraphTarget) -> tuple[int, ...]:
        is_wide = count and count != target.counts[0]
        return self._few_sizes if is_wide else self._sizes

    def _drop(self) -> None:
        """Give up graphs that neither now nor after the change have a use."""
        targets = (self._now, self._next)
        counts = {0, *(count for target in targets for count in target.counts)}
        counts |= {count for t in targets if t.counts and (count := self._serving(t)) is not None}
        loads = {None, *(target.load for target in targets)}
        keeps = {target.keeps for target in targets}
        gone = [
            key
            for key in self._graphs
            if key.pages not in counts
            or key.load not in loads
            or (key.pages and key.keeps not in keeps)
        ]
        if gone and self._settle:
            self._settle()
        for key in gone:
            del self._graphs[key]
