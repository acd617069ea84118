"""Measurements of the engine: what is asked of it, what the figures are made of, and real runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import (
    GIB,
    Ceiling,
    DecodePoint,
    DecodeReport,
    EngineFailed,
    EngineSpec,
    ExitCode,
    MeasureDecode,
    MeasureKernels,
    Service,
    StartError,
)
from sparsed.engine.engine import Engine
from sparsed.engine.measure.attention_cases import attention_cases, resident_plan
from sparsed.engine.measure.cases import MAX_ROTATIONS, Case, Setting, token_cases
from sparsed.engine.measure.clock import Clock
from sparsed.engine.measure.decode import DecodeMeter, measure_decode
from sparsed.engine.measure.kernels import measure_case, measure_kernels
from sparsed.engine.measure.points import (
    AHEAD_STEPS,
    NUM_STEPS,
    fits,
    prompt_tokens,
    step_read_bytes,
    total_tokens,
    weights_read_bytes,
)
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner
from sparsed.profiler.machine import read_machine

MakeSpec = Callable[..., EngineSpec]
TINY = dummy_config("dummy:tiny").shape
LLAMA = dummy_config("dummy:llama-3.1-8b").shape
SPARSE_KERNELS = {"select_by_mean_keys", "resolve_pages", "summarise_pages"}
HOT_KERNELS = {"attend_hits", "attend_rest"}  # where a sparse step is one graph


# -- arithmetic ------------------------------------------------------------------------------


def test_bytes_of_a_step_by_hand() -> None:
    layer = 2 * 4096 * (4096 + 1024) + 2 * 4096 + 3 * 4096 * 14336
    read = 32 * layer + 4096 + 128256 * 4096  # the head; the embedding is only looked up
    assert weights_read_bytes(LLAMA, dtype="bfloat16") == 2 * read == 15_009_849_344
    kv_bytes = 32 * 8 * 2 * 128 * 2  # of a token: layers, heads, K and V, dims, bytes
    assert step_read_bytes(LLAMA, dtype="bfloat16", kv_tokens=1000) == 2 * read + 1000 * kv_bytes


def test_a_tied_embedding_is_read_as_the_head() -> None:
    layer = 2 * 64 * (64 + 32) + 2 * 64 + 3 * 64 * 128
    assert weights_read_bytes(TINY, dtype="float32") == 4 * (2 * layer + 64 + 512 * 64)


@given(
    requests=st.integers(1, 100),
    tokens=st.integers(1, 40_000),
    chunk_tokens=st.integers(16, 16_384),
)
def test_requests_are_equally_long_when_it_counts(
    requests: int, tokens: int, chunk_tokens: int
) -> None:
    point = DecodePoint(requests=requests, tokens=tokens)
    total = total_tokens(point, chunk_tokens=chunk_tokens)
    for number in range(requests):
        later_steps = (requests - 1 - number) * tokens / chunk_tokens
        length = prompt_tokens(point, number, chunk_tokens=chunk_tokens)
        middle = length + later_steps + AHEAD_STEPS
        assert middle + NUM_STEPS / 2 + 2 <= total, "none ends before"
        if length > 1:
            assert tokens - 1 <= middle <= tokens


def test_a_point_fits_or_does_not(make_spec: MakeSpec) -> None:
    spec = make_spec(lane_blocks=10, num_frames=20, max_num_seqs=4, prefill_chunk=512)

    def is_fitting(requests: int, tokens: int, spec: EngineSpec = spec) -> bool:
        point = DecodePoint(requests=requests, tokens=tokens)
        return fits(point, knobs=spec.knobs, plan=spec.plan, num_lanes=TINY.num_lanes)

    assert is_fitting(1, 1200) and is_fitting(4, 200)
    assert not is_fitting(1, 1280), "eleven blocks, with the output"
    assert not is_fitting(5, 100), "max_num_seqs"
    assert not is_fitting(1, 4090), "max_model_len"
    sparse = make_spec(lane_blocks=10, num_frames=20, sparse_method="quest", token_budget=256)
    assert is_fitting(1, 2400, sparse) and not is_fitting(1, 2600, sparse), "the DRAM tier"


# -- runs on a CPU ---------------------------------------------------------------------------


def make_meter(spec: EngineSpec) -> DecodeMeter:
    runner = Runner(spec, on_progress=lambda *_: None)
    engine = Engine(runner, knobs=spec.knobs, service=Service(recall_floor=0.0))
    return DecodeMeter(runner, engine, spec=spec, copy_bytes_per_s=1e9)


@pytest.mark.parametrize("prefill_chunk", [128, 2048])
def test_decode_steps_are_measured_one_point_after_the_other(
    make_spec: MakeSpec, prefill_chunk: int
) -> None:
    meter = make_meter(make_spec(sparse_method="dense", prefill_chunk=prefill_chunk))
    for requests, tokens in ((1, 300), (5, 200), (1, 30)):
        speed = meter.measure(DecodePoint(requests=requests, tokens=tokens))
        assert speed.requests == requests and abs(speed.tokens - tokens) <= 2
        kv_bytes = speed.read_bytes - weights_read_bytes(TINY, dtype="float32")
        assert kv_bytes == pytest.approx(requests * speed.tokens * 512, abs=512 * requests)
        assert speed.floor_ms == pytest.approx(speed.read_bytes / 1e6)
        assert speed.floor_ratio == pytest.approx(speed.step_ms / speed.floor_ms)
        assert speed.tokens_per_s == pytest.approx(1e3 * requests / speed.step_ms)
        assert speed.graph_ms is speed.not_hidden_ms is None


def test_a_selection_is_less_to_read(make_spec: MakeSpec) -> None:
    meter = make_meter(make_spec(sparse_method="quest", token_budget=256, prefill_chunk=512))
    speed = meter.measure(DecodePoint(requests=2, tokens=1000))
    kv_bytes = speed.read_bytes - weights_read_bytes(TINY, dtype="float32")
    assert kv_bytes == pytest.approx(2 * 256 * 512, rel=0.1)


def test_nothing_that_fits_is_an_error(make_spec: MakeSpec) -> None:
    points = (DecodePoint(requests=99, tokens=100),)
    wanted = MeasureDecode(spec=make_spec(sparse_method="dense"), points=points)
    with pytest.raises(StartError, match="no batch of any context fits"):
        measure_decode(wanted, on_progress=lambda *_: None)


def kernels_on(device: str, dtype: str) -> MeasureKernels:
    return MeasureKernels(
        device=device, dtype=dtype, shape=TINY, page_size=16, batches=(1, 2), contexts=(300,)
    )


def setting_on(device: str) -> Setting:
    return Setting(
        device=torch.device(device),
        dtype=torch.float32,
        shape=TINY,
        page_size=16,
        batches=(2,),
        contexts=(300,),
    )


def test_kernels_of_a_cpu_in_plain_torch() -> None:
    seen: list[float] = []
    report = measure_kernels(
        kernels_on("cpu", "float32"), on_progress=lambda _, frac: seen.append(frac)
    )
    assert seen[0] == 0 and seen[-1] == 1
    assert set(report.ceilings) == set(Ceiling) and report.skipped == ()
    names = {speed.kernel for speed in report.kernels}
    assert {"copy_pages h2d", "attend_pages", *SPARSE_KERNELS} <= names
    assert not {"attend_resident", *HOT_KERNELS} & names
    for speed in report.kernels:
        assert speed.ratio == pytest.approx(speed.rate / report.ceilings[speed.ceiling])
        assert speed.rate > 0 and (speed.time_us or 1) > 0


def test_every_case_moves_what_its_name_says() -> None:
    setting = setting_on("cpu")
    amounts = {
        (case.kernel, case.words): case.amount
        for case in (*attention_cases(setting), *token_cases(setting))
    }
    assert amounts["attend_pages", "2 x 128 pages of 16"] == 2 * 2 * 2048 * 2 * 16 * 4
    assert amounts["attend_dense", "512, flash"] == 4 * 4 * 16 * 512 * 513 / 2
    assert amounts["rms_norm", "16 x 64"] == 2 * 16 * 64 * 4
    assert amounts["silu_mul", "16 x 128"] == 3 * 16 * 128 * 4
    assert amounts["rotate_heads", "16 x 6 x 16"] == 16 * (2 * 6 + 2) * 16 * 4
    assert amounts["store_tokens", "16 x 2, 1 a page"] == 2 * 16 * 2 * 2 * 16 * 4
    assert amounts["page_bounds", "64 pages of 16"] == 64 * (16 + 2) * 16 * 4
    frames = 2 * 2 * 3  # requests, heads, frames of 300 tokens
    assert amounts["score_pages", "2 x 300"] == frames * (8 + 8 * (32 * 4 + 4))


def test_inputs_outgrow_caches_but_not_memory() -> None:
    setting = setting_on("cpu")
    assert setting.rotations(1 << 30) == 1
    assert setting.rotations(20 << 20) == 4
    assert setting.rotations(1) == MAX_ROTATIONS["cpu"]


def test_attention_is_cut_as_in_a_step() -> None:
    plan = resident_plan([300, 8192], device=torch.device("cpu"))
    assert plan.lengths_B.tolist() == [300, 8192] and plan.rows_B.tolist() == [0, 1]
    assert plan.first_item_B.tolist() == [0, 2] and plan.num_items_1.tolist() == [34]
    assert all(part.dtype == torch.int32 for part in plan)


def test_time_is_of_one_of_all_that_run() -> None:
    done: list[int] = []
    clock = Clock(torch.device("cpu"))
    assert clock.each_s([lambda: done.append(1), lambda: done.append(2)]) > 0
    assert done == [1, 2] * 6  # once to warm up, five times in earnest


def test_what_comes_before_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    by_hand = SimpleNamespace(now_s=0.0, perf_counter=lambda: by_hand.now_s)
    monkeypatch.setattr("sparsed.engine.measure.clock.time", by_hand)

    def work(name: str, seconds: float) -> None:
        done.append(name)
        by_hand.now_s += seconds

    works = [
        partial(work, "before", 0.02),
        partial(work, "first", 0.001),
        partial(work, "second", 0.003),
    ]
    case = Case("kernel", "", Ceiling.COPY, 1.0, lambda: works, prepared=True)
    clock = Clock(torch.device("cpu"))
    speed = measure_case(case, clock=clock, ceilings={Ceiling.COPY: 1.0})
    assert done == ["before", "first", "second"] * 6
    assert speed is not None and speed.time_us == pytest.approx(2e3)


# -- the process -----------------------------------------------------------------------------


def ask(wanted: MeasureDecode) -> tuple[int, dict[str, msgspec.Raw]]:
    """Exit status and last line of a measuring process; those before must be progress."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sparsed.engine.measure"],
        input=msgspec.json.encode({"MeasureDecode": wanted}),
        capture_output=True,
        check=False,
    )
    *progress, last = (
        msgspec.json.decode(line, type=dict[str, msgspec.Raw]) for line in done.stdout.splitlines()
    )
    assert progress and all(set(line) == {"LoadProgress"} for line in progress)
    return done.returncode, last


@pytest.mark.slow
def test_a_process_says_how_far_it_is_and_what_it_found(make_spec: MakeSpec) -> None:
    spec = make_spec(sparse_method="dense")
    points = (DecodePoint(requests=2, tokens=100), DecodePoint(requests=99, tokens=100))
    code, answer = ask(MeasureDecode(spec=spec, points=points))
    found = msgspec.json.decode(answer["DecodeReport"], type=DecodeReport)
    assert (code, found.model, found.skipped) == (0, "dummy:tiny", points[1:])
    assert len(found.steps) == 1 and found.copy_bytes_per_s > 0


@pytest.mark.slow
def test_a_failure_is_told_in_its_last_line(make_spec: MakeSpec) -> None:
    spec = replace(make_spec(), model="/no/such/model")
    code, answer = ask(MeasureDecode(spec=spec, points=(DecodePoint(requests=1, tokens=9),)))
    failure = msgspec.json.decode(answer["EngineFailed"], type=EngineFailed)
    assert code == failure.exit_code == ExitCode.DATA
    assert "/no/such/model" in failure.message


# -- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """Seconds each; the numbers are printed (run with -s)."""

    def make_spec(self, **values: object) -> EngineSpec:
        machine = read_machine(gpu_index=0)
        asked = {"kv_hbm_gib": 0.5, "kv_dram_gib": 0.5, "max_num_seqs": 8, **values}
        place = {"device": "cuda:0", "dtype": "bfloat16"}
        knobs = resolve_knobs(asked, shape=TINY, machine=machine, **place)
        plan = plan_memory(knobs, shape=TINY, dtype="bfloat16")
        assert machine.hbm_free_bytes > 4 * GIB, "a copy takes half of that"
        return EngineSpec(model="dummy:tiny", knobs=knobs, plan=plan, **place)

    def test_decode_steps_and_their_graphs(self) -> None:
        spec = self.make_spec(sparse_method="dense")
        points = tuple(DecodePoint(requests=n, tokens=1000) for n in (1, 3, 8))
        report = measure_decode(
            MeasureDecode(spec=spec, points=points), on_progress=lambda *_: None
        )
        for step in report.steps:
            print(step)
            assert step.graph_ms is not None and step.not_hidden_ms is not None
            assert 0 < step.graph_ms < 2 * step.step_ms
        assert [step.requests for step in report.steps] == [1, 3, 8]

    def test_steps_that_are_no_graph(self) -> None:
        points = (DecodePoint(requests=2, tokens=1000),)
        eager = replace(self.make_spec(sparse_method="dense"), enforce_eager=True)
        sparse = self.make_spec(sparse_method="quest", token_budget=256)
        for spec in (eager, sparse):
            (step,) = measure_decode(
                MeasureDecode(spec=spec, points=points), on_progress=lambda *_: None
            ).steps
            assert step.graph_ms is None and step.step_ms > 0

    def test_kernels(self) -> None:
        report = measure_kernels(kernels_on("cuda:0", "bfloat16"), on_progress=lambda *_: None)
        names = {speed.kernel for speed in report.kernels}
        assert {"attend_resident", "copy_pages h2d", "copy_pages d2h", "store_tokens"} <= names
        assert SPARSE_KERNELS | HOT_KERNELS <= names
        for speed in report.kernels:
            print(speed)
            assert 0 < speed.ratio < 3
