"""``sparsed plan``: what it predicts is what planner, gates and roofline say, and it never relaxes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed.controller.cli.main import run
from sparsed.controller.plan import request
from sparsed.controller.plan.forecast import Configuration, Place, Traffic
from sparsed.controller.plan.gpus import GPUS, gpu_of, named_gpu
from sparsed.controller.plan.search import CHUNKS, Verdict, choose
from sparsed.core import (
    GIB,
    ExitCode,
    InputError,
    KnobValue,
    MachineFacts,
    Slo,
    SparseMethod,
)
from sparsed.engine.hit_curve import Learned
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.workspace import plan_workspace

LLAMA = dummy_config("dummy:llama-3.1-8b").shape
HOST = MachineFacts(
    cpu_name="any",
    num_cpus=16,
    dram_total_bytes=128 * GIB,
    dram_free_bytes=120 * GIB,
    gpu_name="NVIDIA H100 80GB HBM3",
    num_gpus=1,
    hbm_total_bytes=GPUS["h100"].rates.hbm_bytes,
    hbm_free_bytes=GPUS["h100"].rates.hbm_bytes,
)
PLACE = Place(
    shape=LLAMA, dtype="bfloat16", gpu=GPUS["h100"].rates, machine=HOST, learned=Learned()
)
TRAFFIC = Traffic(context=32768, output_tokens=256, slo=Slo())
SPARSE: dict[str, KnobValue] = {"sparse_method": "mean-key", "kv_hbm_gib": 18.0}
DENSE: dict[str, KnobValue] = {"sparse_method": "dense", "kv_hbm_gib": 18.0}
PlanVerb = Callable[..., tuple[int, Any]]


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> PlanVerb:
    """Run the verb; its exit status, and what it printed as JSON."""

    def run_verb(*arguments: str) -> tuple[int, Any]:
        given_model = [] if "--model" in arguments else ["--model", "dummy:llama-3.1-8b"]
        code = run(
            ["plan", *given_model, *arguments, "-o", "json", "--state-dir", str(tmp_path / "state")]
        )
        return code, json.loads(capsys.readouterr().out or "null")

    return run_verb


def configuration(
    asked: Mapping[str, KnobValue], *, traffic: Traffic = TRAFFIC, place: Place = PLACE
) -> Configuration:
    return Configuration(place, traffic, asked=asked)


@pytest.mark.parametrize("asked", [SPARSE, DENSE, {**SPARSE, "kv_dram_gib": 30.0, "page_size": 32}])
def test_memory_is_the_planners(asked: dict[str, KnobValue]) -> None:
    told = configuration(asked).forecast(1)
    knobs = resolve_knobs(
        {"max_model_len": TRAFFIC.request_tokens, **asked},
        shape=LLAMA,
        machine=HOST,
        device="cuda:0",
        dtype="bfloat16",
    )
    plan = plan_memory(knobs, shape=LLAMA, dtype="bfloat16")
    workspace = plan_workspace(knobs, shape=LLAMA, dtype="bfloat16").total_bytes
    assert replace(told.knobs, max_num_active_seqs=knobs.max_num_active_seqs) == knobs
    assert told.hbm_peak_bytes == plan.weights_bytes + plan.hot_bytes + workspace
    assert told.hbm_peak_bytes < HOST.hbm_total_bytes
    assert told.dram_bytes == plan.dram_pool_bytes


def test_the_gates_let_in_what_fits() -> None:
    """Against the arithmetic of the tiers."""
    dense, sparse = configuration(DENSE), configuration(SPARSE)
    frames = num_frames(TRAFFIC.request_tokens)
    assert dense.limits.hbm == dense.lane_blocks // frames
    assert sparse.limits.dram == sparse.memory.num_frames // frames
    assert dense.limits.hbm < sparse.limits.hbm
    assert sparse.limits.at_once == min(sparse.limits.hbm, sparse.limits.dram, sparse.limits.link)


def test_a_dense_request_larger_than_the_hot_tier_does_not_fit() -> None:
    config = configuration({"sparse_method": "dense", "kv_hbm_gib": 3.0})
    assert config.limits.at_once == 0
    choice = choose(PLACE, TRAFFIC, asked={"sparse_method": "dense", "kv_hbm_gib": 3.0})
    assert (choice.verdict, choice.best) == (Verdict.MEMORY_INFEASIBLE, None)


def test_a_slower_target_never_lets_fewer_in_by_the_link() -> None:
    limits = [
        configuration(SPARSE, traffic=replace(TRAFFIC, slo=Slo(tpot_s=tpot_s))).limits.link
        for tpot_s in (0.007, 0.012, 0.02, 0.05)
    ]
    assert limits == sorted(limits) and limits[0] < limits[-1]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60))
def test_a_larger_batch_takes_longer_and_a_step_is_no_slower_than_the_dense_one(
    requests: int,
) -> None:
    sparse, dense = configuration(SPARSE), configuration(DENSE)
    assert sparse.step(requests + 1).step_s >= sparse.step(requests).step_s
    if sparse.misses(requests) == 0:
        assert sparse.step(requests).step_s <= dense.step(requests).step_s


def test_misses_cost_what_the_link_carries() -> None:
    few, many = (
        configuration(SPARSE, place=replace(PLACE, learned=replace(Learned(), miss_frac=frac)))
        for frac in (0.1, 0.3)
    )
    requests = 24
    told = few.forecast(requests)
    assert told.step.link_s * PLACE.gpu.link_bytes_per_s == pytest.approx(told.link_bytes)
    assert many.forecast(requests).link_bytes == pytest.approx(3 * told.link_bytes)
    assert told.miss_frac > 0


@pytest.mark.parametrize(("stride", "left"), [(2, 0.63), (4, 0.4), (8, 0.25), (16, 0.25)])
def test_a_stride_ranks_and_misses_less(stride: int, left: float) -> None:
    """Shares of the misses as measured; beyond a page it has no effect."""
    asked = {**SPARSE, "page_size": 8}
    one, more = (configuration({**asked, "retrieval_stride": s}) for s in (1, stride))
    few, many = more.forecast(24), one.forecast(24)
    assert few.link_bytes == pytest.approx(left * many.link_bytes, rel=0.02)
    assert few.hbm_bytes < many.hbm_bytes


def test_short_contexts_are_attended_to_whole() -> None:
    short = replace(TRAFFIC, context=512, output_tokens=64)
    told = configuration(SPARSE, traffic=short).forecast(4)
    assert not told.selects and told.link_bytes == 0


def test_dense_layers_read_everything() -> None:
    none, some = (configuration({**SPARSE, "dense_layers": layers}) for layers in (0, 16))
    assert some.forecast(24).hbm_bytes > 1.5 * none.forecast(24).hbm_bytes


def test_targets_are_met_or_told_to_be_missed() -> None:
    slo = Slo(tpot_s=0.02, ttft_s=3.0)
    met = choose(PLACE, replace(TRAFFIC, slo=slo), asked=SPARSE)
    assert met.verdict is Verdict.OK and met.best is not None
    assert met.best.service.tpot_s <= 0.02 and met.best.service.ttft_s <= 3.0
    free = choose(PLACE, TRAFFIC, asked=SPARSE)
    assert free.best is not None
    assert free.best.most.output_tokens_per_s >= met.best.most.output_tokens_per_s
    missed = choose(PLACE, replace(TRAFFIC, slo=Slo(tpot_s=0.005)), asked=SPARSE)
    assert missed.verdict is Verdict.SLO_INFEASIBLE and missed.best is not None
    assert missed.lacks == pytest.approx(missed.best.service.tpot_s / 0.005 - 1)
    assert "TPOT" in missed.why and missed.best.bound.value in missed.why


def test_a_rate_beyond_what_fits_has_its_own_word() -> None:
    choice = choose(PLACE, replace(TRAFFIC, rate_per_s=5.0), asked=SPARSE)
    assert choice.verdict is Verdict.RATE_INFEASIBLE and choice.best is not None
    served = choice.best.most.requests_per_s
    assert served < 5.0
    slower = choose(PLACE, replace(TRAFFIC, rate_per_s=0.9 * served), asked=SPARSE)
    assert slower.verdict is Verdict.OK


def test_the_default_chunk_is_kept_unless_another_pays() -> None:
    choice = choose(PLACE, TRAFFIC, asked={"kv_hbm_gib": 18.0, "kv_dram_gib": 100.0})
    for name, best in choice.by_method.items():
        rates = {}
        for tokens in CHUNKS:
            asked = {"kv_hbm_gib": 18.0, "kv_dram_gib": 100.0, "sparse_method": name}
            config = configuration({**asked, "prefill_chunk": tokens})
            numbers = range(1, config.limits.at_once + 1)
            rates[tokens] = max(config.forecast(n).most.output_tokens_per_s for n in numbers)
        usual_is_near = rates[2048] >= 0.99 * max(rates.values())
        assert (best.knobs.prefill_chunk == 2048) == usual_is_near


# --------------------------------------------------------------------------------------------
# The verb
# --------------------------------------------------------------------------------------------


def test_a_plan_in_json(planned: PlanVerb) -> None:
    code, told = planned("--gpu", "h100", "--kv-dram-gib", "100")
    assert code == ExitCode.OK
    assert told["gpu"]["is_measured"] and told["choice"]["verdict"] == "OK"
    assert set(told["choice"]["by_method"]) == {"dense", "mean-key"}
    best = told["choice"]["best"]
    assert best["hbm_peak_bytes"] == sum(best["hbm"].values())
    assert best["service"]["output_tokens_per_s"] > 0


def test_the_start_line_starts_what_was_planned(planned: PlanVerb) -> None:
    _, told = planned("--gpu", "h100", "--kv-dram-gib", "100", "--slo-tpot-ms", "25")
    words = shlex.split(told["command"])
    assert words[:2] == ["sparsed", "start"]
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    assert flags.pop("--model") == "dummy:llama-3.1-8b"
    assert flags.pop("--dtype") == "bfloat16" and flags.pop("--slo-tpot-ms") == "25"
    asked = {name[2:].replace("-", "_"): value for name, value in flags.items()}
    knobs = resolve_knobs(asked, shape=LLAMA, machine=HOST, device="cuda:0", dtype="bfloat16")
    planned_knobs = told["choice"]["best"]["knobs"]
    for name, value in knobs.as_dict().items():
        if isinstance(value, float):
            assert 0 <= planned_knobs[name] - value < 0.001
        else:
            assert planned_knobs[name] == value


def test_a_plan_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        ["plan", "--model", "dummy:llama-3.1-8b", "--gpu", "A100 80GB", "--rate", "0.1",
         "--state-dir", str(tmp_path)]
    )  # fmt: skip
    told = capsys.readouterr().out
    assert code == ExitCode.OK
    for words in ("A100 SXM 80GB", "data sheet figures", "memory is not known", "start with:"):
        assert words in told


def test_an_infeasible_target_is_told_and_not_relaxed(planned: PlanVerb) -> None:
    code, told = planned("--gpu", "h100", "--kv-dram-gib", "100", "--slo-tpot-ms", "2")
    assert code == ExitCode.UNAVAILABLE
    assert told["choice"]["verdict"] == "SLO_INFEASIBLE"
    assert told["traffic"]["slo"]["tpot_s"] == 0.002
    assert "--slo-tpot-ms 2" in told["command"]


def test_a_directory_needs_only_its_config(
    planned: PlanVerb, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama", max_position_embeddings=4096)
    directory = tmp_path / "my model"
    directory.mkdir()
    (directory / "config.json").write_text((source / "config.json").read_text())
    code, told = planned(
        "--model", str(directory), "--gpu", "l40s", "--output-tokens", "96", "--dtype", "bfloat16"
    )
    assert code == ExitCode.OK
    assert told["traffic"]["context"] == 4000
    assert shlex.split(told["command"])[3] == str(directory)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--gpu", "tpu"), ExitCode.USAGE, "known: h100"),
        (("--gpu", "h100", "--rate", "0"), ExitCode.USAGE, "--rate 0"),
        (("--gpu", "h100", "--miss-frac", "1.5"), ExitCode.USAGE, "--miss-frac 1.5"),
        (("--gpu", "h100", "--context", "131072"), ExitCode.USAGE, "--context 131072"),
        (("--gpu", "h100", "--output-tokens", "131072"), ExitCode.USAGE, "--output-tokens"),
        (("--gpu", "h100", "--context", "0"), ExitCode.USAGE, "--context"),
        (("--gpu", "h100", "--kv-hbm-gib", "500"), ExitCode.USAGE, "kv_hbm_gib=500"),
        (("--gpu", "rtx-4090", "--model", "dummy:qwen3-14b"), ExitCode.UNAVAILABLE, "weights"),
    ],
)
def test_wrong_options_are_named(
    arguments: tuple[str, ...],
    code: ExitCode,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = [] if "--model" in arguments else ["--model", "dummy:llama-3.1-8b"]
    assert run(["plan", *model, *arguments, "--state-dir", str(tmp_path)]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("HBM_BUDGET", "4096", "hbm_budget=4096"), ("MAX_MODEL_LEN", "1024", "max_model_len=1024")],
)
def test_what_a_plan_cannot_follow_is_refused(
    name: str,
    value: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"SPARSED_{name}", value)
    arguments = ["--model", "dummy:llama-3.1-8b", "--gpu", "h100", "--state-dir", str(tmp_path)]
    assert run(["plan", *arguments]) == ExitCode.USAGE
    assert words in capsys.readouterr().err


def test_this_machine_is_planned_for_by_its_driver(
    planned: PlanVerb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "read_machine", lambda gpu_index: HOST)
    code, told = planned()
    assert code == ExitCode.OK
    assert told["gpu"]["name"] == "H100 SXM 80GB"
    assert not any("memory is not known" in note for note in told["notes"])


def test_gpus_are_found_by_name() -> None:
    assert named_gpu("RTX_4090") is GPUS["rtx-4090"].rates
    assert gpu_of(replace(HOST, gpu_name="NVIDIA A100-SXM4-40GB")) is GPUS["a100-40gb"].rates
    for name, words in ((None, "no GPU"), ("NVIDIA T4", "NVIDIA T4 are not known")):
        with pytest.raises(InputError, match=words):
            gpu_of(replace(HOST, gpu_name=name))
    assert [name for name, gpu in GPUS.items() if gpu.rates.is_measured] == ["h100"]


def test_methods_are_those_of_the_knob() -> None:
    asked = {"sparse_method": SparseMethod.QUEST.value, "kv_hbm_gib": 18.0}
    assert set(choose(PLACE, TRAFFIC, asked=asked).by_method) == {"quest"}
