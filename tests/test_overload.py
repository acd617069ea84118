"""The overload benchmark: loads against a clock that is counted by hand, the stack, and all of it small."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import overload
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from overload import goodputs, judge, parse_options, table
from overload_load import AtOnce, Course, Driven, Load, Prompts, Watched, drive, make_requests
from overload_load import summarise as summary
from overload_recompute import Recomputing
from overload_stack import MODES, STACK, PlainCopies, Runners, Setting, parse_mode, resident_gate

from sparsed.core import AddRequest, FinishReason, InputError, TokenBatch, TokenOutput, WaitReason
from sparsed.engine.admission import Claim, Room
from sparsed.engine.batch import PromptChunk, StepPlan
from sparsed.engine.engine import Engine, Model
from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.models.dummy import dummy_config

GEOMETRY = Geometry(num_layers=2, num_kv_heads=2, head_dim=16, page_size=32, element_bytes=4)
LOAD = Load(count=3, prompt_tokens=200, output_tokens=5)


class FakeEngine:
    """One prompt a step, then a token a step for each; a step takes ``step_s`` of ``now_s``. The
    first ``num_refused`` requests are refused."""

    def __init__(self, *, step_s: float = 1.0, num_refused: int = 0) -> None:
        self.now_s = 100.0
        self.added: list[AddRequest] = []
        self.stepping: list[str] = []
        self._step_s = step_s
        self._waiting: list[AddRequest] = []
        self._left: dict[str, int] = {}
        self._outputs: list[TokenOutput] = []
        self._num_refused = num_refused
        self.model: Any = None

    @property
    def as_engine(self) -> Engine:
        """To those that call no more of an engine than there is of this one."""
        return cast(Engine, self)

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + 1e-9

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._left or self._outputs)

    def add(self, request: AddRequest) -> None:
        self.added.append(request)
        if len(self.added) <= self._num_refused:
            self._say(request.request_id, None, FinishReason.ERROR, error="never fits")
        else:
            self._waiting.append(request)

    def abort(self, name: str) -> None:
        waiting = [one for one in self._waiting if one.request_id != name]
        if self._left.pop(name, None) is not None or len(waiting) < len(self._waiting):
            self._say(name, None, FinishReason.ABORT)
        self._waiting = waiting

    def step(self) -> TokenBatch:
        self.stepping = list(self._left)
        for name in self.stepping:
            self._draw(name)
        if self._waiting:
            request = self._waiting.pop(0)
            chunk = PromptChunk(
                row=0, tokens=request.prompt_tokens, start=0,
                prompt_length=len(request.prompt_tokens), logits_from=0,
            )  # fmt: skip
            if self.model is not None:
                self.model.run(StepPlan(chunks=(chunk,), decodes=()))
            self._left[request.request_id] = request.sampling.max_tokens
            self._draw(request.request_id)
        self.now_s += self._step_s
        outputs, self._outputs = self._outputs, []
        return TokenBatch(outputs=tuple(outputs))

    def _draw(self, name: str) -> None:
        self._left[name] -= 1
        over = self._left[name] == 0
        self._say(name, len(self.added), FinishReason.LENGTH if over else None)
        if over:
            del self._left[name]

    def _say(
        self, name: str, token: int | None, reason: FinishReason | None, error: str | None = None
    ) -> None:
        self._outputs.append(
            TokenOutput(request_id=name, index=0, token_id=token, finish_reason=reason, error=error)
        )


class NoModel:
    def run(self, plan: StepPlan) -> None: ...


def run(engine: FakeEngine, load: Load, *, limit_s: float = math.inf) -> Driven:
    engine.model = Watched(cast(Model, NoModel()), clock=engine.clock)
    return drive(
        engine.as_engine,
        engine.model,
        make_requests(load, Prompts(vocab_size=512)),
        arrivals_s=load.arrivals_s(),
        front=AtOnce(engine.as_engine),
        limit_s=limit_s,
        clock=engine.clock,
        sleep=engine.sleep,
    )


def test_what_becomes_of_a_load_is_what_a_clock_by_hand_says() -> None:
    """Three at once, a prompt a step: first tokens after 1, 2 and 3 s, and one a second from then."""
    found = summary(run(FakeEngine(), LOAD))
    assert found["total_s"] == 7.0 and found["output_tokens"] == 15 and found["finished"] == 3
    assert found["output_tokens_per_s"] == pytest.approx(15 / 7)
    assert (found["mean_ttft_s"], found["p99_ttft_s"]) == (2.0, 3.0)
    assert found["mean_delay_s"] == pytest.approx(1.0), "prompts begin after 0, 1 and 2 s"
    assert found["mean_tpot_ms"] == found["p99_tpot_ms"] == found["p99_gap_ms"] == 1000.0
    assert not found["is_cut"] and not found["refused"]


def test_a_load_that_is_cut_counts_waits_up_to_the_end() -> None:
    engine = FakeEngine()
    found = summary(run(engine, replace(LOAD, count=5), limit_s=3.0))
    assert found["is_cut"] and found["finished"] == 0 and found["output_tokens"] == 6
    assert found["mean_ttft_s"] == pytest.approx((1 + 2 + 3 + 3 + 3) / 5)
    assert found["mean_delay_s"] == pytest.approx((0 + 1 + 2 + 3 + 3) / 5)
    assert not engine.has_work, "the next load finds it empty"


def test_refused_requests_have_no_figures() -> None:
    found = summary(run(FakeEngine(num_refused=2), LOAD))
    assert found["refused"] == 2 and found["finished"] == 1 and not found["is_cut"]
    assert found["mean_ttft_s"] == 1.0
    assert summary(run(FakeEngine(num_refused=3), LOAD))["mean_tpot_ms"] is None


def test_requests_come_when_they_are_due() -> None:
    """An engine that is always idle again before the next one: nobody waits for anybody."""
    engine = FakeEngine(step_s=1e-3)
    load = replace(LOAD, count=20, rate=0.5)
    driven = run(engine, load)
    assert summary(driven)["mean_delay_s"] < 0.01
    assert driven.total_s == pytest.approx(load.arrivals_s()[-1], abs=0.1)


@given(
    count=st.integers(1, 50), rate=st.floats(0.01, 100), scale=st.floats(0.1, 10), seed=st.integers(0, 9)
)  # fmt: skip
def test_rates_differ_by_a_scale_alone(count: int, rate: float, scale: float, seed: int) -> None:
    load = replace(LOAD, count=count, rate=rate, seed=seed)
    times_s = load.arrivals_s()
    assert len(times_s) == count and times_s[0] == 0 and times_s == sorted(times_s)
    others_s = replace(load, rate=rate * scale).arrivals_s()
    assert np.allclose(np.array(others_s) * scale, times_s)
    assert set(replace(load, rate=math.inf).arrivals_s()) == {0.0}


def test_gaps_are_those_of_the_rate() -> None:
    times_s = replace(LOAD, count=20_000, rate=4.0).arrivals_s()
    assert np.diff(times_s).mean() == pytest.approx(1 / 4, rel=0.05)
    assert np.diff(times_s).std() == pytest.approx(1 / 4, rel=0.05), "as of a Poisson process"


def test_prompts_are_known_by_their_first_token() -> None:
    text = Prompts(vocab_size=512, tokens=range(100))
    assert text.make(2, 60) == (2, *range(21, 80)) and text.make(1, 60)[-20:] == tuple(range(20))
    drawn = Prompts(vocab_size=512)
    assert drawn.make(7, 40)[0] == 7 and drawn.make(7, 40) == drawn.make(7, 40)
    assert drawn.make(7, 40)[1:] != drawn.make(8, 40)[1:]
    with pytest.raises(AssertionError, match="more requests"):
        drawn.make(512, 40)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 300)), min_size=1, max_size=6),
    lane_blocks=st.integers(1, 12),
)
def test_recomputing_never_overcommits_and_loses_no_token(
    sizes: Sequence[tuple[int, int]], lane_blocks: int
) -> None:
    engine = FakeEngine()
    front = Recomputing(engine.as_engine, lane_blocks=lane_blocks)
    asked = [
        make_requests(replace(LOAD, count=i + 1, prompt_tokens=p, output_tokens=o), Prompts(vocab_size=512))[i]
        for i, (p, o) in enumerate(sizes)
    ]  # fmt: skip
    for request in asked:
        front.add(request)
    drawn: dict[str, list[int]] = {request.request_id: [] for request in asked}
    while front.has_work:
        front.settle()
        outputs = engine.step().outputs
        held = {one.request_id: len(one.prompt_tokens) for one in asked}
        blocks = [num_frames(held[name] + len(drawn[name]) + 1) for name in engine.stepping]
        assert len(blocks) < 2 or sum(blocks) <= lane_blocks
        for output in outputs:
            if front.note(output) and output.token_id is not None:
                drawn[output.request_id].append(output.token_id)
    for request in asked:
        assert len(drawn[request.request_id]) == request.sampling.max_tokens
        (*_, last) = [one for one in engine.added if one.request_id == request.request_id]
        again = last.prompt_tokens[len(request.prompt_tokens) :]
        assert list(again) == drawn[request.request_id][: len(again)]
    assert front.num_preempted == len(engine.added) - len(asked)


@given(
    rows=st.lists(st.tuples(st.integers(-1, 63), st.integers(0, 31)), max_size=20, unique_by=lambda r: r[1]),
    count=st.none() | st.integers(0, 25),
)  # fmt: skip
def test_plain_copies_move_what_the_kernel_moves(
    rows: Sequence[tuple[int, int]], count: int | None
) -> None:
    device = torch.device("cpu")
    pool = DramPool(GEOMETRY, num_frames=4, dtype=torch.float32, device=device, pool_fd=None)
    pool.pages_RX.copy_(torch.arange(pool.pages_RX.numel()).view(pool.pages_RX.shape))
    src_M, dst_M = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in range(2))
    found = []
    transfer = Transfer(page_bytes=GEOMETRY.page_bytes, device=device)
    plain = Transfer(
        page_bytes=GEOMETRY.page_bytes, device=device, copy_rows=PlainCopies(pool, device=device)
    )
    for way in (transfer, plain):
        hot = pool.pages_RX.new_full((32, pool.pages_RX.shape[1]), -1)
        limit = None if count is None else torch.tensor(count)
        way.load(hot, pool.pages_RX, dst_rows=dst_M, src_rows=src_M, count=limit)
        found.append(hot)
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plain_copies_cross_the_link() -> None:
    device = torch.device("cuda:0")
    pool = DramPool(GEOMETRY, num_frames=16, dtype=torch.float32, device=device, pool_fd=None)
    pool.pages_RX.copy_(torch.randn(pool.pages_RX.shape))
    hot = torch.zeros(100, pool.pages_RX.shape[1], device=device)
    dst_M = torch.randperm(100, device=device)[:60]
    src_M = torch.randperm(len(pool.pages_RX), device=device)[:60]
    src_M[7] = -1
    copies = PlainCopies(pool, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        copies(
            hot, pool.pages_RX, dst_rows_M=dst_M, src_rows_M=src_M, count=torch.tensor([50]).cuda()
        )
    torch.cuda.synchronize()
    expected = torch.zeros_like(hot)
    moved = [i for i in range(50) if i != 7]
    expected[dst_M[moved]] = pool.pages_RX[src_M[moved].cpu()].to(device)
    assert torch.equal(hot, expected)


def test_each_mode_adds_one_mechanism() -> None:
    def differ(a: str, b: str) -> set[str]:
        first, second = (asdict(MODES[name]) for name in (a, b))
        return {name for name in first if first[name] != second[name]} - {"name"}

    names = [mode.name for mode in STACK]
    steps = [differ(*pair) for pair in itertools.pairwise(names)]
    assert steps == [
        {"is_sparse"},
        {"gates", "plain_copies"},  # DRAM holds what the hot tier does not, and copies join them
        {"plain_copies"},
        {"looks_ahead"},
        {"gates"},
        {"residency"},
        {"residency", "rule"},
    ]
    assert differ("buffering", "dense-resident") >= {"gates", "rule", "looks_ahead", "is_sparse"}


def test_names_of_modes() -> None:
    assert parse_mode("static-1.5").hbm_budget(2048) == 3072
    assert parse_mode("mandatory-only").hbm_budget(2048) == 2048
    assert parse_mode("buffering").hbm_budget(2048) is None
    for name in ("static-0.5", "static-", "static-nan", "2", "dense"):
        with pytest.raises(InputError, match=f"unknown mode '{name}'; known: dense-resident"):
            parse_mode(name)


def test_the_gate_of_resident_modes_counts_all_pages() -> None:
    def claim(total: float) -> Claim:
        curve = MissCurve(slots=1, misses=0, exponent=1, selected=1, total=total)
        return Claim(mandatory_pages=1, working_set_pages=1, frames=1, curve=curve)

    room = Room(hot_pages=100, free_frames=9, free_rows=9)
    assert resident_gate([claim(40), claim(30)], claim(30), room) is None
    assert resident_gate([claim(40), claim(30)], claim(31), room) is WaitReason.HOT_TIER
    assert resident_gate([], claim(101), room) is WaitReason.HOT_TIER


def row(mode: str, speed: float, **values: Any) -> dict[str, Any]:
    """A row that keeps the promise, but for ``values``."""
    course = Course(arrived_s=0.0, started_s=0.0, tokens_s=[1.0, 1.01], is_over=True)
    figures = summary(Driven(courses=(course,), total_s=2.0, is_cut=False))
    rest = {"loads_per_step": 0.0, "miss_frac": None, "spills": 0, "waits": {}, "unit_ms": 8.0}
    return {
        "mode": mode, "rate": 1.0, **figures, **rest, "output_tokens_per_s": speed,
        "p99_tpot_ms": 200.0, "mean_delay_s": 2.0, **values,
    }  # fmt: skip


def test_rows_are_judged_by_the_fastest_step_and_the_mode_before() -> None:
    rows = [
        row("dense-recompute", 5.0),
        row("dense-resident", 10.0),
        row("dense-resident", 90.0, rate=2.0, mean_delay_s=2.1),
        row("sparse-resident", 15.0, unit_ms=99.0),
        row("static-3", 60.0, p99_tpot_ms=200.1),
        row("offload", 30.0, unit_ms=None),
        row("fast-transfer", 90.0, is_cut=True),
        row("buffering", 45.0, p99_tpot_ms=None),
    ]
    judge(rows)
    assert [one["keeps_slo"] for one in rows] == [
        True,
        True,
        False,
        True,
        False,
        True,
        False,
        False,
    ]
    assert [one["factor"] for one in rows] == [None, 2.0, None, 1.5, 4.0, 2.0, 3.0, 0.5]
    assert rows[4]["factor_over"] == "sparse-resident" == rows[5]["factor_over"]
    best = goodputs(rows)
    assert best["dense-resident"] == {"rate": 1.0, "output_tokens_per_s": 10.0}
    assert best["buffering"] == {"rate": None, "output_tokens_per_s": 0.0}
    lines = list(table(rows))
    assert len(lines) == 9 and len({line.index("SLO") for line in lines[1:]}) == 1
    assert "cut, 1 of 1 done" in lines[7] and "missed" in lines[7] and "kept" in lines[2]


@pytest.fixture(scope="module")
def runners() -> Runners:
    return Runners(
        Setting(
            model="dummy:tiny",
            device="cpu",
            shape=dummy_config("dummy:tiny").shape,
            tokens=800,
            kv_tokens=8 * 896,
            max_num_seqs=8,
            token_budget=256,
            hot_gib=0.004,
            dram_gib=1.0,
            prefill_chunk=128,
        )
    )


def test_recomputed_requests_draw_the_same_tokens(runners: Runners) -> None:
    load = Load(count=8, prompt_tokens=600, output_tokens=200)
    texts: list[dict[str, list[int]]] = []
    preempted = 0
    for name in ("dense-resident", "dense-recompute"):
        runner, spec = runners.get(MODES[name])
        engine = Engine(runner, knobs=spec.knobs, gates=MODES[name].gates)
        front: AtOnce | Recomputing = AtOnce(engine)
        with (
            overload.on_demand(runner.kv.shares)
            if MODES[name].recomputes
            else overload.nullcontext()
        ):
            if MODES[name].recomputes:
                front = Recomputing(engine, lane_blocks=runner.kv.shares.lane_blocks)
            for request in make_requests(load, Prompts(vocab_size=512)):
                front.add(request)
            texts.append({})
            while front.has_work:
                front.settle()
                for output in engine.step().outputs:
                    if front.note(output) and output.token_id is not None:
                        texts[-1].setdefault(output.request_id, []).append(output.token_id)
                assert all(one.complete for one in runner.kv.rows.values()), "nobody is streamed"
        runner.kv.check_integrity()
        preempted = front.num_preempted if isinstance(front, Recomputing) else 0
    assert preempted > 0
    assert texts[0] == texts[1]


def test_runners_are_turned_over_from_mode_to_mode(runners: Runners) -> None:
    runner, spec = runners.get(MODES["fast-transfer"])
    again, other = runners.get(parse_mode("static-2"))
    assert again is runner and other.knobs.hbm_budget == 512 and spec.knobs.hbm_budget is None
    assert runner.kv.shares.knobs.hbm_budget == 512
    assert runners.get(MODES["buffering"])[0].kv.shares.knobs.hbm_budget is None
    plain, spec = runners.get(MODES["offload"])
    assert plain is not runner and spec.enforce_eager
    assert isinstance(plain.kv.transfer.copy_rows, PlainCopies)


@pytest.mark.slow
def test_all_modes_in_one_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "made" / "overload.json"
    names = [*MODES, "static-2"]
    flags = "--model dummy:tiny --device cpu --count 8 --prompt-tokens 600 --output-tokens 24"
    flags += " --budget 256 --hot-gib 0.003 --prefill-chunk 128 --rates inf 40"
    flags += f" --modes {' '.join(names)} --output {file}"
    monkeypatch.setattr(sys, "argv", ["overload.py", *flags.split()])
    overload.main()
    result = json.loads(file.read_text())
    rows = result["rows"]
    assert [(one["mode"], one["rate"]) for one in rows] == [
        (n, r) for n in names for r in (None, 40)
    ]
    assert all(one["finished"] == 8 and one["output_tokens"] == 192 for one in rows)
    assert all(one["mean_delay_s"] <= one["mean_ttft_s"] <= one["p99_ttft_s"] for one in rows)
    loads = {one["mode"]: one["loads_per_step"] for one in rows if one["rate"] is None}
    assert loads["dense-resident"] == loads["sparse-resident"] == loads["dense-recompute"] == 0
    assert loads["offload"] == loads["fast-transfer"] > 0 and loads["mandatory-only"] > 0
    waits = {one["mode"]: one["waits"] for one in rows if one["rate"] is None}
    assert waits["dense-resident"]["hot-tier"] and not result["rows"][0]["errors"]
    assert set(result["goodput"]) == set(names) and result["versions"]["torch"]
    assert "loads/step" in capsys.readouterr().out


@pytest.mark.slow
def test_what_can_never_fit_is_refused_and_told() -> None:
    flags = "--model dummy:tiny --device cpu --count 2 --prompt-tokens 3000 --output-tokens 20"
    options = parse_options([*flags.split(), "--budget", "256", "--hot-gib", "0.003"])
    (found,) = overload.Bench(options).run(MODES["dense-resident"], [math.inf])
    assert found["refused"] == 2 and found["refusals"] == {"hot-tier": 2} and found["errors"]
    assert found["unit_ms"] is None and found["p99_tpot_ms"] is None
