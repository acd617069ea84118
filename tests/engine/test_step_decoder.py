"""Steps of resident requests, against the runner's own way through the tiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import BLOCK_TOKENS, EngineSpec, SparseMethod
from sparsed.engine import assembly
from sparsed.engine.batch import DecodeRow, DrawParams, StepPlan
from sparsed.engine.draws import draw
from sparsed.engine.kvcache.rebalance import ROUND_STEPS
from sparsed.engine.recorder import Drawn, Recorded
from sparsed.engine.runner import Runner
from sparsed.engine.step_decoder import StepDecoder
from sparsed.engine.step_graphs import graph_sizes
from sparsed.engine.step_input import (
    MAX_SPLIT_TOKENS,
    MIN_SPLIT_TOKENS,
    SPLITS,
    InputBuffer,
    StepRow,
    cut_items,
)
from sparsed.kernels.sample import DrawPlan

MakeRunner = Callable[..., Runner]
MakeSteps = Callable[..., StepDecoder]
Prefill = Callable[..., int]
lengths = st.lists(st.integers(0, 300_000), min_size=1, max_size=40)


@given(lengths=lengths)
def test_items_cover_every_token_once_in_order(lengths: list[int]) -> None:
    first_B, items_I3 = cut_items(np.array(lengths, dtype=np.int32))
    for b, length in enumerate(lengths):
        end = first_B[b + 1] if b + 1 < len(lengths) else len(items_I3)
        mine = items_I3[first_B[b] : end]
        assert (mine[:, 0] == b).all()
        edges = [0, *mine[:, 2].tolist()]
        assert mine[:, 1].tolist() == edges[:-1] and edges[-1] == length
        assert all(start % BLOCK_TOKENS == 0 for start in mine[:, 1].tolist())


@given(lengths=lengths)
def test_a_request_is_cut_by_its_own_length_alone(lengths: list[int]) -> None:
    _, together = cut_items(np.array(lengths, dtype=np.int32))
    for b, length in enumerate(lengths):
        _, alone = cut_items(np.array([length], dtype=np.int32))
        assert together[together[:, 0] == b, 1:].tolist() == alone[:, 1:].tolist()
        if MIN_SPLIT_TOKENS * SPLITS <= length <= MAX_SPLIT_TOKENS * SPLITS:
            assert SPLITS // 2 <= len(alone) <= SPLITS


draws = st.builds(
    DrawParams,
    seed=st.integers(-(2**127), 2**128 - 1),
    token_index=st.integers(0, 10**6),
    temperature=st.floats(2**-10, 100, width=32),
    top_p=st.floats(0, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    top_k=st.integers(0, 2**31 - 1),
)
MOST_LIKELY = DrawParams(0, 0, 0.0, 0.0, 0.0, 0)


@given(max_rows=st.integers(1, 1100))
def test_every_batch_has_a_graph_that_pads_it_little(max_rows: int) -> None:
    sizes = graph_sizes(max_rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_rows and len(sizes) < 40
    for count in range(1, max_rows + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count < max(2 * count, 4) and size - count < 64


@st.composite
def step_rows(draw: st.DrawFn) -> StepRow:
    decode = DecodeRow(
        row=draw(st.integers(0, 98)),
        token=draw(st.none() | st.integers(0, 10**5)),
        position=draw(st.integers(0, 10**5)),
        draw=draw(st.none() | draws),
    )
    if draw(st.booleans()):
        return StepRow(decode, in_place=decode.position + 1)
    return StepRow(
        decode,
        0,
        num_full=decode.position // 8,
        num_selected=draw(st.integers(1, 255)),
        keeps=draw(st.booleans()),
    )


@given(data=st.data(), size=st.integers(1, 8))
def test_the_input_buffer_gives_back_what_was_put_in(data: st.DataObject, size: int) -> None:
    buffer = InputBuffer(max_rows=8, max_items=4096, spare_row=99, device=torch.device("cpu"))
    for step in range(3):  # what an earlier step left behind must not matter
        rows = data.draw(st.lists(step_rows(), max_size=size))
        buffer.fill(rows, size=size, step=step)
        inputs = buffer.view(size, 4096)
        padding = size - len(rows)
        tokens = [-1 if row.decode.token is None else row.decode.token for row in rows]
        assert inputs.known_B.tolist() == tokens + [0] * padding
        assert inputs.rows_B.tolist() == [row.decode.row for row in rows] + [99] * padding
        assert inputs.positions_B.tolist() == [r.decode.position for r in rows] + [0] * padding
        assert inputs.step_1.tolist() == [step]
        plan, pages = inputs.attention, inputs.pages
        assert plan.lengths_B.tolist() == [row.in_place for row in rows] + [0] * padding
        first_B, items_I3 = cut_items(plan.lengths_B.numpy())
        assert plan.first_item_B.tolist() == first_B.tolist()
        assert plan.num_items_1.tolist() == [len(items_I3)]
        assert plan.items_I3[: len(items_I3)].tolist() == items_I3.tolist()
        assert pages.num_full_B.tolist() == [row.num_full for row in rows] + [0] * padding
        assert pages.count_B.tolist() == [row.num_selected for row in rows] + [0] * padding
        assert inputs.keeps_B.tolist() == [row.keeps for row in rows] + [0] * padding
        ranked = pages.to_rank(inputs.keeps_B)
        asked = [(row.num_full, row.num_selected) if not row.keeps else (0, 0) for row in rows]
        assert list(zip(*(part.tolist() for part in ranked), strict=True))[: len(rows)] == asked
        check_draws(inputs.draws, [row.decode.draw or MOST_LIKELY for row in rows], padding)


def check_draws(asked: DrawPlan, expected: list[DrawParams], padding: int) -> None:
    expected = expected + [MOST_LIKELY] * padding
    words = [[(one.seed >> 32 * word) % 2**32 for one in expected] for word in range(4)]
    assert (asked.key_4B.numpy().view(np.uint32) == words).all()
    columns = zip(*(column_B.tolist() for column_B in asked[1:]), strict=True)
    assert list(columns) == [one[1:] for one in expected]


def run_queued(runner: Runner, steps: StepDecoder, decodes: list[DecodeRow], *, step: int) -> Drawn:
    for decode in decodes:
        runner.kv.make_room(decode.row, decode.position)
    rows = [steps.row_of(decode) for decode in decodes]
    assert all(row is not None for row in rows), "a row cannot take part"
    return steps.run([row for row in rows if row is not None], step=step)


@pytest.mark.parametrize("page_size", [8, 32, 128])
def test_a_resident_step_draws_what_the_runner_draws(
    make_runner: MakeRunner,
    make_steps: MakeSteps,
    page_size: int,
    prefill: Prefill,
) -> None:
    prompts = [[7] * 3, list(range(127)), list(range(300)), list(range(128))]
    one, other = (make_runner(page_size=page_size, token_budget=512) for _ in range(2))
    rows, others = (
        [prefill(runner, tokens, method=SparseMethod.DENSE) for tokens in prompts]
        for runner in (one, other)
    )
    assert rows == others
    steps = make_steps(other)
    known: list[int | None] = [1, 2, 3, 4]
    drawn = torch.tensor([1, 2, 3, 4])
    hot = DrawParams(seed=3, token_index=0, temperature=2.0, top_p=0.9, min_p=0.0, top_k=40)
    for step in range(40):  # over ends of pages and blocks
        asked_now = [None, hot._replace(token_index=step), hot._replace(token_index=step + 9), None]
        decodes = [
            DecodeRow(row=row, token=token, position=len(prompt) + step, draw=asked)
            for row, token, prompt, asked in zip(rows, known, prompts, asked_now, strict=True)
        ]
        given_ = [
            DecodeRow(row=d.row, token=int(t), position=d.position)
            for d, t in zip(decodes, drawn, strict=True)
        ]
        expected = one.run(StepPlan(chunks=(), decodes=tuple(given_)))
        got = run_queued(other, steps, decodes, step=1000 + step)
        torch.testing.assert_close(got.logits_NV, expected.logits_NV, atol=1e-4, rtol=1e-4)
        drawn = draw(expected.logits_NV, draws=asked_now)
        assert torch.equal(got.tokens_N, drawn)
        known = [None, int(drawn[1]), None, None]  # the device's own token, or the host's


@pytest.mark.parametrize(
    ("looks_ahead", "stride"), [(False, 1), (False, 3), (False, 16), (True, 1), (True, 3)]
)
@pytest.mark.parametrize("hot_blocks", [11, 40])
@pytest.mark.parametrize("page_size", [8, 32])
def test_a_step_over_both_tiers_draws_what_the_runner_draws(
    make_runner: MakeRunner,
    make_steps: MakeSteps,
    page_size: int,
    hot_blocks: int,
    looks_ahead: bool,
    stride: int,
    prefill: Prefill,
) -> None:
    """Evictions or none, beside a row that attends to everything and one that grows sparse."""
    settings = {
        "page_size": page_size,
        "token_budget": 256,
        "lane_blocks": hot_blocks,
        "retrieval_stride": stride,
    }
    one, other = (make_runner(**settings) for _ in range(2))
    prompts = [
        [i * i % 199 for i in range(700)],
        list(range(40)),
        [5, 6] * 350,
        list(range(250)),
    ]
    methods = [
        SparseMethod.MEAN_KEY,
        SparseMethod.DENSE,
        SparseMethod.MEAN_KEY,
        SparseMethod.MEAN_KEY,
    ]
    for runner in (one, other):
        for tokens, method in zip(prompts, methods, strict=True):
            prefill(runner, tokens, method=method)
    rows = sorted(one.kv.rows)
    steps = make_steps(other, looks_ahead=looks_ahead)
    for step in range(40):
        decodes = [
            DecodeRow(row=row, token=step + b, position=len(prompts[b]) + step)
            for b, row in enumerate(rows)
        ]
        expected = one.run(StepPlan(chunks=(), decodes=tuple(decodes)))
        got = run_queued(other, steps, decodes, step=1000 + step)
        torch.testing.assert_close(got.logits_NV, expected.logits_NV, atol=1e-4, rtol=1e-4)
    assert steps.tiered is not None
    selected, missed, evicted, overflow, _ = steps.tiered.now.counters.read()
    assert selected > 0 and overflow == 0
    assert (missed > 0) == (hot_blocks == 11) == (evicted > 0)


@pytest.mark.parametrize("ahead", [False, True])
def test_lanes_that_lose_their_balance_change_no_token(
    make_runner: MakeRunner,
    make_steps: MakeSteps,
    monkeypatch: pytest.MonkeyPatch,
    ahead: bool,
    prefill: Prefill,
) -> None:
    """Rounds move blocks between two steps of a request; what it attends to stays the same."""
    settings = {"page_size": 8, "token_budget": 256, "lane_blocks": 4}
    one, other = (make_runner(**settings) for _ in range(2))
    monkeypatch.setattr(one._rebalancer, "step", lambda _step: None)
    if ahead:
        other.steps = make_steps(other)
    prompt = [i * i % 199 for i in range(700)]
    for runner in (one, other):
        prefill(runner, prompt, output=ROUND_STEPS + 30)
    (row,) = one.kv.rows
    for step in range(ROUND_STEPS + 30):
        plan = StepPlan(
            chunks=(), decodes=(DecodeRow(row=row, token=step, position=len(prompt) + step),)
        )
        other.kv.tables.demand_RLH2[row, 0, 0] += 20  # random weights tell lanes little apart
        expected, got = one.run(plan), other.run(plan)
        torch.testing.assert_close(got.logits_NV, expected.logits_NV, atol=1e-4, rtol=1e-4)
    blocks = [runner.kv.rows[row].blocks for runner in (one, other)]
    assert blocks[0].least == blocks[0].most == 4
    assert blocks[1].counts_L.sum() == blocks[0].counts_L.sum()
    assert blocks[1].least < blocks[1].most
    assert other.stats().overflow_pages == 0
    other.kv.check_integrity()
    if ahead:  # the smallest lane says whether a selection fits: beside it two pages
        assert other.steps is not None
        last = DecodeRow(row=row, token=0, position=len(prompt) + ROUND_STEPS)
        for spare, fits in ((2, True), (1, False)):
            selected = 16 * blocks[1].least - spare
            other.kv.rows[row].token_budget = 8 * (selected + 1)
            assert (other.steps.row_of(last) is not None) == fits


class CpuRecorder:
    """Graphs of a CPU: a replay does the step again, from the same inputs to the same results."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.recorded: list[Recorded] = []
        self.num_replays = 0

    def record(self, run: Callable[[], Drawn]) -> Recorded:
        drawn = run()

        def replay() -> None:
            self.num_replays += 1
            for old, new in zip(drawn, run(), strict=True):
                old.copy_(new)

        self.recorded.append(Recorded(replay, drawn))
        return self.recorded[-1]

    def settle(self) -> None: ...


class AheadRunner(Runner):
    """Takes the way of a CUDA device."""

    @property
    def runs_ahead(self) -> bool:
        return True


def recording_runner(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> AheadRunner:
    """Its steps always select: what is faster in place depends on the clock."""
    monkeypatch.setattr(assembly, "CudaRecorder", CpuRecorder)
    return AheadRunner(replace(spec, always_select=True), on_progress=lambda *_: None)


def recorder_of(runner: Runner) -> CpuRecorder:
    assert runner.steps is not None
    recorder = runner.steps._recorder
    assert isinstance(recorder, CpuRecorder)
    return recorder


@pytest.mark.parametrize("own", [None, 512])
def test_graphs_recorded_between_steps_change_no_token(
    make_spec: Callable[..., EngineSpec],
    monkeypatch: pytest.MonkeyPatch,
    own: int | None,
    prefill: Prefill,
) -> None:
    """Of a request that is wider than the knob, and of a knob that is raised and lowered meanwhile;
    against steps launched one by one, which take each change at once."""
    spec = make_spec(page_size=8, token_budget=256, lane_blocks=24, max_num_seqs=3)
    one = Runner(spec, on_progress=lambda *_: None)
    other = recording_runner(spec, monkeypatch)
    prompts = [[i * i % 199 for i in range(900)], [i % 31 for i in range(800)]]
    rows, others = (
        [prefill(runner, prompts[0]), prefill(runner, prompts[1], token_budget=own)]
        for runner in (one, other)
    )
    assert rows == others
    recorder, knobs = recorder_of(other), spec.knobs
    budgets = {6: 512, 40: 300}
    asked, in_force, num_eager = None, [knobs], 0
    for step in range(60):
        if step in budgets:
            asked = replace(knobs, token_budget=budgets[step])
            other.ask(asked)
        other.prepare(idle=True)  # a graph or more, however slow this machine is
        if asked is not None and other.readiness == 1.0:
            for runner in (one, other):
                runner.apply(asked)
            in_force.append(asked)
            asked = None
        plan = StepPlan(
            chunks=(),
            decodes=tuple(
                DecodeRow(row=row, token=step + row, position=len(prompts[i]) + step)
                for i, row in enumerate(rows)
            ),
        )
        replays = recorder.num_replays
        expected, got = one.run(plan), other.run(plan)
        num_eager += recorder.num_replays == replays
        torch.testing.assert_close(got.logits_NV, expected.logits_NV, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.tokens_N, expected.tokens_N)
    assert [k.token_budget for k in in_force] == [256, 512, 300]
    assert 0 < num_eager <= 3 if own else num_eager == 0
    assert other.steps is not None and not other.is_preparing
    assert other.steps.last.pages == (600 if own else 300) // 8 - 1
    one.kv.check_integrity()
    other.kv.check_integrity()


def test_a_stride_that_comes_and_goes_means_the_same_in_graphs(
    make_spec: Callable[..., EngineSpec], monkeypatch: pytest.MonkeyPatch, prefill: Prefill
) -> None:
    """Against steps launched one by one. Graphs are recorded anew once only, when the first stride
    above 1 comes."""
    spec = make_spec(page_size=8, token_budget=256, lane_blocks=24, max_num_seqs=2)
    one = Runner(spec, on_progress=lambda *_: None)
    other = recording_runner(spec, monkeypatch)
    prompts = [[i * i % 199 for i in range(900)], [i % 31 for i in range(803)]]
    rows, _ = ([prefill(runner, tokens) for tokens in prompts] for runner in (one, other))
    recorder, num_kept = recorder_of(other), []
    for step in range(48):
        if step % 12 == 0:
            knobs = replace(spec.knobs, retrieval_stride=(1, 3, 5, 1)[step // 12])
            before = len(recorder.recorded)
            other.ask(knobs)
            while other.readiness < 1.0:
                other.prepare(idle=True)
            assert (len(recorder.recorded) > before) == (step == 12)
            for runner in (one, other):
                runner.apply(knobs)
        decodes = tuple(
            DecodeRow(row=row, token=step + row, position=len(prompts[i]) + step)
            for i, row in enumerate(rows)
        )
        kept = other.kv.kept
        num_kept += [kept.serves(other.kv.rows[d.row], d.position) for d in decodes]
        plan, replays = StepPlan(chunks=(), decodes=decodes), recorder.num_replays
        expected, got = one.run(plan), other.run(plan)
        assert recorder.num_replays == replays + 1
        torch.testing.assert_close(got.logits_NV, expected.logits_NV, atol=1e-4, rtol=1e-4)
    assert not any(num_kept[:24]) and not any(num_kept[72:])
    assert 24 < sum(num_kept) < 48
    other.kv.check_integrity()


def test_other_copies_come_with_graphs_of_their_own(
    make_spec: Callable[..., EngineSpec],
    monkeypatch: pytest.MonkeyPatch,
    prefill: Prefill,
) -> None:
    spec = make_spec(page_size=8, token_budget=256, lane_blocks=6, max_num_seqs=2)
    runner = recording_runner(spec, monkeypatch)
    ways, recorder = runner.kv.transfer.ways, recorder_of(runner)
    monkeypatch.setattr(ways, "_is_cpu", False)  # a CPU loads in one way only
    row = prefill(runner, [i * i % 199 for i in range(900)])
    for position, programs in enumerate((7, 9), 900):
        num_recorded, knobs = len(recorder.recorded), replace(spec.knobs, copy_programs=programs)
        runner.ask(knobs)
        while runner.readiness < 1.0:
            runner.prepare(idle=True)
        assert len(recorder.recorded) == num_recorded + 2 * 4, "of every size that fetches"
        runner.apply(knobs)
        replays = recorder.num_replays
        decode = DecodeRow(row=row, token=1, position=position)
        runner.run(StepPlan(chunks=(), decodes=(decode,)))
        assert recorder.num_replays == replays + 1
        assert runner.steps is not None and runner.steps.last.load == ways.load
        assert ways.load.programs == programs


def test_counters_go_on_over_a_raise(
    make_spec: Callable[..., EngineSpec],
    monkeypatch: pytest.MonkeyPatch,
    prefill: Prefill,
) -> None:
    spec = make_spec(page_size=8, token_budget=256, lane_blocks=40)
    runner = recording_runner(spec, monkeypatch)
    row = prefill(runner, [i % 199 for i in range(900)])
    decode = DecodeRow(row=row, token=1, position=900)
    runner.run(StepPlan(chunks=(), decodes=(decode,)))
    before = runner.stats()
    assert before.hot_hits > 0
    wider = replace(spec.knobs, token_budget=640, hbm_budget=None)
    runner.ask(wider)
    while runner.is_preparing:
        assert runner.readiness < 1.0
        runner.prepare(idle=True)
    runner.apply(wider)
    assert runner.stats().hot_hits == before.hot_hits, "padding counts for nothing"
    runner.run(StepPlan(chunks=(), decodes=(replace(decode, position=901),)))
    assert runner.stats().hot_hits - before.hot_hits > before.hot_hits
    assert runner.steps is not None and runner.steps.last.pages == 640 // 8 - 1
