"""Attention of a decode step over both tiers, on the device from selection to result.

A layer ranks its pages, selects, finds out which of the selected pages are in the hot tier and
gives the others slots; they are fetched on a stream of their own while attention reads those that
are there. With look-ahead the same is done a layer early for the pages that the layer will probably
select: what was foreseen wrongly costs bytes, and never changes a result. Nothing waits for the
host, so that a CUDA graph can hold all of it.

Shape legend: B requests, padded, H KV heads, G query heads per KV head, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.engine.fetch_times import UNTIMED, Fetch, StepTimes
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.streams import new_stream
from sparsed.engine.sparse.base import Selector
from sparsed.engine.sparse.replay import SelectionTrace
from sparsed.engine.step_input import Pages, StepInput
from sparsed.engine.step_selection import LayerSelection
from sparsed.kernels.resolve import Resolved
from sparsed.kernels.selected import (
    Selected,
    attend_hits,
    attend_rest,
    make_partials,
)
from sparsed.kernels.store import store_tokens

FETCH_PRIORITY = -1  # before the attention it runs beside


class Step(NamedTuple):
    """A step's inputs, and what all its layers make of them: pages that each request attends to,
    place of the token in its partial page, tokens of that page, the step before. ``width``: columns
    of its selections. ``ranked``: the pages to select from, of requests that do not keep what they
    have. ``fetches`` false: no page can be missing. ``times``: who times the fetches."""

    inputs: StepInput
    ranked: Pages
    count_B: Tensor
    offsets_B: Tensor
    tail_tokens_B: Tensor
    before_1: Tensor
    width: int
    fetches: bool
    keeps: bool
    times: StepTimes


class Fetching(NamedTuple):
    """Pages on their way: when they are there, and who times it."""

    is_over: torch.cuda.Event
    fetch: Fetch


class Coming(NamedTuple):
    """Pages of a layer to come: when they have their slots, and their way."""

    has_slots: torch.cuda.Event
    fetching: Fetching


class Placed(NamedTuple):
    """Where the pages of a layer are. Hits may be read after ``foreseen``, misses after ``missed``
    (None: at once)."""

    selected: Selected
    foreseen: Fetching | None
    missed: Fetching | None


class TieredAttention:
    """Call ``begin``, then for every layer in order ``place`` and ``attend``, then ``finish``; with
    look-ahead, ``foresee`` a layer before its ``place``. What ``place`` gives holds until it is
    called again. ``ahead`` None: no look-ahead. One stream of the caller.
    """

    def __init__(
        self,
        cache: KVCache,
        selector: Selector,
        *,
        max_rows: int,
        max_count: int,
        max_pages: int,
        scale: float,
        trace: SelectionTrace | None,
        looks_ahead: bool,
    ) -> None:
        device = cache.arena.pages_NX.device
        self._cache = cache
        self._scale = scale
        self._trace = trace
        self._fetch_stream = new_stream(device, priority=FETCH_PRIORITY)
        self._ahead_stream = new_stream(device)

        def selection(*, keeps_lists: bool) -> LayerSelection:
            return LayerSelection(
                cache,
                selector,
                max_rows=max_rows,
                max_count=max_count,
                max_pages=max_pages,
                keeps_lists=keeps_lists,
            )

        self.now = selection(keeps_lists=False)
        self.ahead = selection(keeps_lists=True) if looks_ahead else None
        self._coming: dict[int, Coming] = {}  # by layer
        self._kept: list[Callable[[], Tensor]] = []  # what another stream may still be reading

    @property
    def max_count(self) -> int:
        """Most full pages that a request may select here."""
        return self.now.max_count

    def count_on(self, before: TieredAttention) -> None:
        """Go on with the counters of another; before the first step and anything recorded. What
        goes back would look like a new engine, whose counters all count anew."""
        self.now.counters = before.now.counters
        if self.ahead is not None and before.ahead is not None:
            self.ahead.counters = before.ahead.counters

    def begin(
        self,
        inputs: StepInput,
        *,
        width: int,
        fetches: bool,
        keeps: bool = False,
        times: StepTimes = UNTIMED,
    ) -> Step:
        """Start a step, whose requests select ``width`` pages at most: forget what the last one had
        to fetch. ``keeps``: what they select is kept, and some may keep what they have."""
        for selection in (self.now, self.ahead):
            if selection is not None:
                selection.misses_L.zero_()
        if self._trace is not None:
            self._trace.begin(
                inputs.rows_B,
                positions_B=inputs.positions_B,
                pages=inputs.pages,
                width=width,
            )
        self._coming.clear()
        self._kept.clear()
        offsets_B = inputs.positions_B % self._cache.geometry.page_size
        return Step(
            inputs=inputs,
            ranked=inputs.pages.to_rank(inputs.keeps_B) if keeps else inputs.pages,
            count_B=torch.minimum(inputs.pages.count_B, inputs.pages.num_full_B),
            offsets_B=offsets_B,
            tail_tokens_B=offsets_B + 1,
            before_1=inputs.step_1 - 1,
            width=width,
            fetches=fetches,
            keeps=keeps,
            times=times,
        )

    def foresee(self, step: Step, layer: int, make_query: Callable[[], Tensor]) -> None:
        """Fetch what ``layer`` will probably select. Its pages count as used in the step before, so
        that those that it does select may take their slots."""
        if self.ahead is None:
            return
        stream, fetch = self._ahead_stream, step.times.fetch()
        if stream is None:
            self._fetch_at_once(self._resolve_ahead(self.ahead, step, layer, make_query()), fetch)
            return
        self._kept.append(make_query)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            resolved = self._resolve_ahead(self.ahead, step, layer, make_query())
            has_slots = stream.record_event()
            self._fetch(resolved, fetch)
            self._coming[layer] = Coming(has_slots, Fetching(stream.record_event(), fetch))

    def place(self, step: Step, layer: int, q_BHGD: Tensor, k_BHD: Tensor, v_BHD: Tensor) -> Placed:
        """Select the pages of a layer, give them slots, have those fetched that are missing, and
        store the token in its partial page."""
        inputs = step.inputs
        pages_BHK = self.now.select(layer, q_BHGD, inputs, ranked=step.ranked, width=step.width)
        if step.keeps:
            self._cache.kept.exchange(
                layer,
                pages_BHK,
                rows_B=inputs.rows_B,
                count_B=step.count_B,
                keeps_B=inputs.keeps_B,
            )
        if self._trace is not None:
            self._trace.overwrite(layer, pages_BHK)
        coming = self._coming.pop(layer, None)
        if coming is not None:
            torch.cuda.current_stream(q_BHGD.device).wait_event(coming.has_slots)
        resolved = self.now.resolve(layer, pages_BHK, inputs, step_1=inputs.step_1)
        missed = None
        if step.fetches:
            missed = self._fetch_beside(resolved, step.times.fetch(), after=coming)
        store_tokens(
            self._cache.arena.pages_NTCD,
            slots_BH=resolved.tail_slots_BH,
            offsets_B=step.offsets_B,
            k_BHD=k_BHD,
            v_BHD=v_BHD,
        )
        selected = Selected(
            slots_BHK=resolved.slots_BHK,
            num_hits_BH=resolved.num_hits_BH,
            count_B=step.count_B,
            tail_slots_BH=resolved.tail_slots_BH,
            tail_tokens_B=step.tail_tokens_B,
        )
        foreseen = None if coming is None else coming.fetching
        return Placed(selected, foreseen, missed)

    def attend(self, placed: Placed, q_BHGD: Tensor, *, out_BHGD: Tensor, lse_BHG: Tensor) -> None:
        """Attend to the placed pages and to the partial one: into ``out``, and the logs of the
        softmax sums into ``lse``, for requests that select."""
        cache, scale, selected = self._cache, self._scale, placed.selected
        arena_NTCD, page_size = cache.arena.pages_NTCD, cache.geometry.page_size
        partials = make_partials(selected, q_BHGD, page_size=page_size)
        _wait(placed.foreseen)
        attend_hits(q_BHGD, arena_NTCD, selected=selected, partials=partials, scale=scale)
        _wait(placed.missed)
        attend_rest(
            q_BHGD,
            arena_NTCD,
            selected=selected,
            partials=partials,
            scale=scale,
            out_BHGD=out_BHGD,
            lse_BHG=lse_BHG,
        )

    def finish(self, step: Step) -> None:
        """End a step: count what was fetched, and what of it for nothing."""
        for selection in (self.now, self.ahead):
            if selection is not None:
                self._cache.transfer.count_fetched(selection.misses_L.sum())
        if step.fetches and self.ahead is not None:
            self.ahead.count_wasted(step.inputs)

    def _resolve_ahead(
        self, ahead: LayerSelection, step: Step, layer: int, q_BHD: Tensor
    ) -> Resolved:
        """Slots for the pages that these queries of the layer before select."""
        num_heads, head_dim = self._cache.geometry.num_kv_heads, self._cache.geometry.head_dim
        q_BHGD = q_BHD.view(len(q_BHD), num_heads, -1, head_dim)
        inputs = step.inputs
        pages_BHK = ahead.select(layer, q_BHGD, inputs, ranked=step.ranked, width=step.width)
        if self._trace is not None:
            self._trace.foretell(layer, pages_BHK)
        return ahead.resolve(layer, pages_BHK, inputs, step_1=step.before_1)

    def _fetch_beside(
        self, resolved: Resolved, fetch: Fetch, *, after: Coming | None
    ) -> Fetching | None:
        """Fetch missing pages on the stream of fetches; what to wait for. ``after``: an earlier
        fetch that may still be writing to slots that were taken from it."""
        stream = self._fetch_stream
        if stream is None:
            self._fetch_at_once(resolved, fetch)
            return None
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        if after is not None:
            stream.wait_event(after.fetching.is_over)
        with torch.cuda.stream(stream):
            self._fetch(resolved, fetch)
            return Fetching(stream.record_event(), fetch)

    def _fetch_at_once(self, resolved: Resolved, fetch: Fetch) -> None:
        """On a CPU nothing runs beside it."""
        fetch.is_needed()
        self._fetch(resolved, fetch)

    def _fetch(self, resolved: Resolved, fetch: Fetch) -> None:
        cache = self._cache
        fetch.starts()
        cache.transfer.fetch(
            cache.arena.pages_NX,
            cache.pool.pages_RX,
            dst_rows_M=resolved.miss_dst_M,
            src_rows_M=resolved.miss_src_M,
            count_1=resolved.num_misses_1,
        )
        fetch.ends(resolved.num_misses_1)


def _wait(fetching: Fetching | None) -> None:
    """The current stream goes on once the pages are there."""
    if fetching is not None:
        fetching.fetch.is_needed()
        torch.cuda.current_stream().wait_event(fetching.is_over)
