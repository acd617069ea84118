"""Replayed selections: what is attended to is what was recorded, on the eager way and the queued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsed.core import EngineSpec, InputError
from sparsed.engine.batch import DecodeRow, StepPlan
from sparsed.engine.evaluate.recording import Recording, RecordingHeader, write_recording
from sparsed.engine.runner import Runner
from sparsed.engine.sparse.replay import ANCHOR_PAGES, LANE_SHIFT, ROW_SHIFT, SelectionTrace
from sparsed.engine.step_decoder import StepDecoder
from sparsed.engine.step_input import Pages

MakeSpec = Callable[..., EngineSpec]
MakeSteps = Callable[..., StepDecoder]
Prefill = Callable[..., int]

PAGE_SIZE, BUDGET = 8, 256
STEPS, LANES, RECORDED_TOKENS = 7, 6, 1000
LENGTHS = (2100, 2300, 1500, 2200, 2150)  # one is too short for what was recorded
BUDGETS = (None, None, None, 320, 128)  # others select more than was recorded, or less
REPLAYED = [0, 1]  # of the requests


@pytest.fixture(scope="module")
def recording() -> Recording:
    rng = np.random.default_rng(3)
    num_full = RECORDED_TOKENS // PAGE_SIZE
    ranked = np.stack([
        np.stack([rng.permutation(num_full)[:60] for _ in range(LANES)]) for _ in range(STEPS)
    ])  # fmt: skip
    header = RecordingHeader(
        model="tiny",
        text="words",
        method="quest",
        commit="0123abc",
        context_tokens=RECORDED_TOKENS,
        page_size=PAGE_SIZE,
        token_budget=BUDGET,
        sink_pages=1,
        recent_pages=1,
        num_kv_heads=2,
        dense_layers=0,
    )
    return Recording(header=header, ranked_SLR=ranked.astype(np.int32))


@pytest.fixture
def file(tmp_path: Path, recording: Recording) -> Path:
    path = tmp_path / "recording.npz"
    write_recording(path, recording)
    return path


def prefilled(spec: EngineSpec, prefill: Prefill) -> Runner:
    runner = Runner(spec, on_progress=lambda *_: None)
    for number, (length, budget) in enumerate(zip(LENGTHS, BUDGETS, strict=True)):
        tokens = [(i * i + number) % 199 for i in range(length)]
        prefill(runner, tokens, token_budget=budget, output=8)
    return runner


def decodes_of(runner: Runner, turn: int) -> list[DecodeRow]:
    rows = sorted(runner.kv.rows)
    return [
        DecodeRow(row=row, token=turn + b, position=length + turn)
        for b, (row, length) in enumerate(zip(rows, LENGTHS, strict=True))
    ]


def replayed_pages(
    recording: Recording, *, lane: int, row: int, position: int, num_full: int
) -> list[int] | None:
    """What a lane of a request with the recorded budget attends to, page by page; None: its own
    selection."""
    selection = recording.selection(range(STEPS), page_size=PAGE_SIZE, token_budget=BUDGET)
    touched = [sorted({int(page) for page in selection[:, y].ravel()}) for y in range(LANES)]
    anchor = num_full // ANCHOR_PAGES * ANCHOR_PAGES
    by_need = sorted(range(LANES), key=lambda y: len(touched[y]))
    fitting = [y for y in by_need if len(touched[y]) <= anchor]
    if not fitting:
        return None
    recorded = fitting[(lane + row) % len(fitting)]
    step = (position + row * ROW_SHIFT + lane * LANE_SHIFT) % STEPS
    ranks = sorted(touched[recorded].index(int(page)) for page in selection[step, recorded])
    return [rank * anchor // len(touched[recorded]) for rank in ranks]


def test_a_runner_attends_to_what_was_recorded(
    make_spec: MakeSpec,
    file: Path,
    recording: Recording,
    monkeypatch: pytest.MonkeyPatch,
    prefill: Prefill,
) -> None:
    asked = {"page_size": PAGE_SIZE, "token_budget": BUDGET, "lane_blocks": 17}
    spec = replace(make_spec(**asked), selection_trace=str(file))
    runner = prefilled(spec, prefill)
    assert runner.facts.selection_trace == str(file)
    residency, seen = runner.attention.tiers.residency, []
    bring_in = residency.bring_in

    def spy(pages_BHK: Tensor, *, layer: int, rows_B: Tensor, **values: Any) -> Any:
        seen.append((layer, rows_B.tolist(), pages_BHK.clone()))
        return bring_in(pages_BHK, layer=layer, rows_B=rows_B, **values)

    monkeypatch.setattr(residency, "bring_in", spy)
    decodes = decodes_of(runner, 0)
    runner.run(StepPlan(chunks=(), decodes=tuple(decodes)))
    positions = {decode.row: decode.position for decode in decodes}
    replayed = [decodes[i].row for i in REPLAYED]
    num_heads, found = runner.kv.geometry.num_kv_heads, 0
    for layer, rows, pages_BHK in seen:
        for row, pages_HK in zip(rows, pages_BHK, strict=True):
            for head in range(num_heads):
                expected = replayed_pages(
                    recording,
                    lane=layer * num_heads + head,
                    row=row,
                    position=positions[row],
                    num_full=positions[row] // PAGE_SIZE,
                )
                if expected is not None:
                    is_replayed = pages_HK[head].tolist() == expected
                    assert is_replayed == (row in replayed)
                    found += is_replayed
                else:
                    assert row == decodes[2].row
                assert (pages_HK[head] >= 0).all()
    assert found == len(REPLAYED) * runner.kv.geometry.num_lanes
    told = [runner.kv.details(decode.row).replayed for decode in decodes]
    assert told == [True, True, False, False, False]
    assert all(runner.kv.details(d.row).sparse_steps == 1 for d in decodes)
    assert not any(runner.kv.details(d.row, num_dropped=1).replayed for d in decodes)


@pytest.mark.parametrize(("lane_blocks", "looks_ahead"), [(17, False), (17, True), (60, False)])
def test_queued_steps_replay_as_eager_ones_do(
    make_spec: MakeSpec,
    make_steps: MakeSteps,
    file: Path,
    lane_blocks: int,
    looks_ahead: bool,
    prefill: Prefill,
) -> None:
    asked = {"page_size": PAGE_SIZE, "token_budget": BUDGET, "lane_blocks": lane_blocks}
    own = make_spec(**asked)
    spec = replace(own, selection_trace=str(file))
    one, other, free = prefilled(spec, prefill), prefilled(spec, prefill), prefilled(own, prefill)
    steps = make_steps(other, looks_ahead=looks_ahead)
    differs = False
    for turn in range(6):
        decodes = decodes_of(one, turn)
        expected = one.run(StepPlan(chunks=(), decodes=tuple(decodes))).logits_NV.clone()
        unchanged = free.run(StepPlan(chunks=(), decodes=tuple(decodes))).logits_NV
        differs |= not torch.allclose(expected[:2], unchanged[:2], atol=1e-3)
        torch.testing.assert_close(expected[2:], unchanged[2:], atol=1e-4, rtol=1e-4)
        for decode in decodes:
            other.kv.make_room(decode.row, decode.position)
        queued = [found for found in map(steps.row_of, decodes) if found is not None]
        assert len(queued) == len(decodes)
        got = steps.run(queued, step=1000 + turn)
        torch.testing.assert_close(got.logits_NV, expected, atol=1e-4, rtol=1e-4)
    assert differs, "the replay changed nothing"
    assert not free.kv.details(decodes[0].row).replayed


@settings(max_examples=50)
@given(
    asked=st.lists(st.tuples(st.integers(24, 32), st.integers(0, 900)), min_size=1, max_size=6),
    touched=st.integers(31, 600),
)
def test_host_and_device_agree_on_who_replays(asked: list[tuple[int, int]], touched: int) -> None:
    pages_SYK = np.arange(touched // 31 * 31).reshape(-1, 1, 31)
    trace = SelectionTrace(pages_SYK, num_layers=1, num_heads=1, device=torch.device("cpu"))
    count_B, num_full_B = torch.tensor(asked, dtype=torch.int32).T
    rows_B = torch.arange(len(asked), dtype=torch.int32)
    pages = Pages(num_full_B=num_full_B, count_B=count_B)
    trace.begin(rows_B, positions_B=num_full_B * PAGE_SIZE, pages=pages, width=40)
    own_BHK = torch.full((len(asked), 1, 40), -7, dtype=torch.int32)
    trace.overwrite(0, own_BHK)
    on_device = (own_BHK[:, 0, 0] != -7).tolist()
    assert on_device == [trace.replays(count, num_full=num_full) for count, num_full in asked]


def test_an_engine_refuses_what_it_cannot_replay(make_spec: MakeSpec, file: Path) -> None:
    spec = replace(make_spec(page_size=32, token_budget=8192), selection_trace=str(file))
    with pytest.raises(InputError, match="more needs a recording of more ranks"):
        Runner(spec, on_progress=lambda *_: None)


def test_a_context_within_the_budget_cannot_be_replayed(
    make_spec: MakeSpec, recording: Recording, tmp_path: Path
) -> None:
    header = replace(recording.header, context_tokens=200)
    ranked = np.tile(np.arange(25, dtype=np.int32), (STEPS, LANES, 1))
    ranked = np.pad(ranked, ((0, 0), (0, 0), (0, 35)), constant_values=-1)
    write_recording(tmp_path / "short.npz", Recording(header=header, ranked_SLR=ranked))
    spec = make_spec(page_size=PAGE_SIZE, token_budget=BUDGET)
    with pytest.raises(InputError, match="nothing to select") as caught:
        Runner(
            replace(spec, selection_trace=str(tmp_path / "short.npz")), on_progress=lambda *_: None
        )
    assert caught.value.field == "token_budget"
