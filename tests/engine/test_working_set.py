"""What an engine tells of the pages its requests use, and of their summaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from sparsed.core import SparseMethod
from sparsed.engine.batch import DecodeRow, StepPlan
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.runner import Runner
from sparsed.engine.step_decoder import StepDecoder
from sparsed.engine.step_input import StepInput
from sparsed.kernels.buckets import WINDOW_STEPS

MakeRunner = Callable[..., Runner]
MakeSteps = Callable[..., StepDecoder]
Prefill = Callable[..., int]
LENGTHS = (700, 620)
Selections = dict[tuple[int, int, int], list[set[int]]]  # of (row, layer, head), step by step


def prefilled(runner: Runner, prefill: Prefill) -> list[int]:
    return [
        prefill(runner, [(i * i + number) % 199 for i in range(length)], output=60)
        for number, length in enumerate(LENGTHS)
    ]


def test_the_working_set_is_what_the_newest_steps_selected(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, prefill: Prefill
) -> None:
    runner = make_runner(page_size=8, token_budget=256)
    assert runner.stats().working_set_pages == 0
    rows = prefilled(runner, prefill)
    residency = runner.attention.tiers.residency
    bring_in, selected = residency.bring_in, Selections()

    def spy(pages_BHK: Tensor, *, layer: int, rows_B: Tensor, **values: Any) -> Any:
        for row, pages_HK in zip(rows_B.tolist(), pages_BHK.tolist(), strict=True):
            for head, pages in enumerate(pages_HK):
                selected.setdefault((row, layer, head), []).append(set(pages))
        return bring_in(pages_BHK, layer=layer, rows_B=rows_B, **values)

    monkeypatch.setattr(residency, "bring_in", spy)

    def expected(*of: int) -> int:
        lanes = [steps for (row, _, _), steps in selected.items() if row in of]
        return sum(len(set().union(*steps[-WINDOW_STEPS:])) for steps in lanes)

    for turn in range(2 * WINDOW_STEPS):
        decodes = [
            DecodeRow(row=row, token=7 * turn, position=length + turn)
            for row, length in zip(rows, LENGTHS, strict=True)
        ]
        runner.run(StepPlan(chunks=(), decodes=tuple(decodes)))
    stats = runner.stats()
    assert stats.working_set_pages == expected(*rows) > 2 * 31 * runner.kv.geometry.num_lanes
    assert stats.working_set_bytes == stats.working_set_pages * runner.kv.geometry.page_bytes
    runner.kv.free(rows[0])
    assert runner.stats().working_set_pages == expected(rows[1]) > 0
    runner.kv.free(rows[1])
    assert runner.stats().working_set_pages == 0


def test_a_row_that_attends_in_place_has_no_working_set(
    make_runner: MakeRunner, make_steps: MakeSteps, prefill: Prefill
) -> None:
    """Like any other that reads everything; what it used while it selected is not told for ever.
    The row beside it goes on."""
    runner = make_runner(page_size=8, token_budget=256, lane_blocks=40)
    rows = prefilled(runner, prefill)
    runner.steps = make_steps(runner)
    windows = runner.kv.tables.window_RLH

    def run(turn: int) -> None:
        decodes = [
            DecodeRow(row=row, token=7 * turn, position=length + turn)
            for row, length in zip(rows, LENGTHS, strict=True)
        ]
        runner.run(StepPlan(chunks=(), decodes=tuple(decodes)))

    for turn in range(3):
        run(turn)
    assert (windows[rows] >= 31).all()
    runner.kv.rows[rows[0]].method = SparseMethod.DENSE  # as the quality breaker does
    run(3)
    assert (windows[rows[0]] == 0).all() and (windows[rows[1]] >= 31).all()
    assert runner.stats().working_set_pages == windows[rows[1]].sum()
    assert [runner.kv.rows[row].steps_in_row for row in rows] == [0, 4]


@pytest.mark.parametrize("method", [SparseMethod.MEAN_KEY, SparseMethod.QUEST, SparseMethod.DENSE])
def test_metadata_is_the_summaries_of_frames_in_use(
    make_runner: MakeRunner, method: SparseMethod, prefill: Prefill
) -> None:
    runner = make_runner(page_size=8, token_budget=256, sparse_method=method)
    assert runner.stats().metadata_bytes == 0
    prefilled(runner, prefill)
    frames = sum(num_frames(length + 60) for length in LENGTHS)
    per_frame = runner.kv.geometry.summary_bytes_per_frame(method)
    assert runner.stats().metadata_bytes == frames * per_frame
    assert (per_frame > 0) == (method is not SparseMethod.DENSE)


def test_copies_by_way_add_up(make_runner: MakeRunner, prefill: Prefill) -> None:
    runner = make_runner(page_size=8, token_budget=256, lane_blocks=6)
    rows = prefilled(runner, prefill)
    decode = DecodeRow(row=rows[0], token=1, position=LENGTHS[0])
    runner.run(StepPlan(chunks=(), decodes=(decode,)))
    stats = runner.stats()
    for direction, num_bytes, seconds in (
        ("h2d", stats.h2d_bytes, stats.h2d_s),
        ("d2h", stats.d2h_bytes, stats.d2h_s),
    ):
        found = [item for item in stats.copies if item.direction == direction]
        assert sum(item.num_bytes for item in found) == num_bytes > 0
        assert sum(item.seconds for item in found) == seconds > 0


def foreseen_and_not_selected(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Page rows that queued steps from now on fetch ahead and do not select; it grows as they run."""
    assert runner.steps is not None and runner.steps.tiered is not None
    tiered, tables, wasted = runner.steps.tiered, runner.kv.tables, list[int]()
    foreseen: dict[int, set[int]] = {}

    def resolve_now(layer: int, pages_BHK: Tensor, inputs: StepInput, **values: Any) -> Any:
        rows_BHK = tables.selected_page_rows(inputs.rows_B.long(), layer, pages_BHK.clamp(min=0))
        is_real_BHK = (pages_BHK >= 0) & (inputs.rows_B < tables.spare_row)[:, None, None]
        wasted.extend(foreseen.pop(layer, set()) - set(rows_BHK[is_real_BHK].tolist()))
        return now(layer, pages_BHK, inputs, **values)

    def resolve_ahead(layer: int, *values: Any, **more: Any) -> Any:
        resolved = ahead(layer, *values, **more)
        foreseen[layer] = set(resolved.miss_src_M[: int(resolved.num_misses_1)].tolist())
        return resolved

    now = tiered.now.resolve
    monkeypatch.setattr(tiered.now, "resolve", resolve_now)
    if tiered.ahead is not None:
        ahead = tiered.ahead.resolve
        monkeypatch.setattr(tiered.ahead, "resolve", resolve_ahead)
    return wasted


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_pages_fetched_a_layer_ahead_are_counted_apart(
    make_runner: MakeRunner,
    make_steps: MakeSteps,
    monkeypatch: pytest.MonkeyPatch,
    looks_ahead: bool,
    prefill: Prefill,
) -> None:
    """What is waited for and what was foreseen together are all that crossed the link."""
    runner = make_runner(page_size=8, token_budget=256, lane_blocks=6)
    rows = prefilled(runner, prefill)
    runner.steps = make_steps(runner, looks_ahead=looks_ahead)
    before, fetched_for_nothing = runner.stats(), foreseen_and_not_selected(runner, monkeypatch)
    for turn in range(6):
        decodes = [
            DecodeRow(row=row, token=7 * turn, position=length + turn)
            for row, length in zip(rows, LENGTHS, strict=True)
        ]
        runner.run(StepPlan(chunks=(), decodes=tuple(decodes)))
    stats = runner.stats()
    assert (stats.foreseen_pages > 0) == looks_ahead
    assert stats.wasted_pages == len(fetched_for_nothing)
    assert (stats.foreseen_pages > stats.wasted_pages > 0) == looks_ahead
    fetched = (stats.h2d_bytes - before.h2d_bytes) / runner.kv.geometry.page_bytes
    assert fetched == stats.hot_misses + stats.foreseen_pages > 0
    assert stats.hot_hits + stats.hot_misses == 6 * 2 * 31 * runner.kv.geometry.num_lanes
    assert stats.working_set_pages > 0
