"""The engine on a CUDA device against itself on the CPU: same tokens, close logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsed.core import (
    GIB,
    AddRequest,
    EngineSpec,
    MachineFacts,
    SamplingParams,
    SparseMethod,
)
from sparsed.engine.batch import DecodeRow, DrawParams, PromptChunk, StepPlan
from sparsed.engine.draws import draw
from sparsed.engine.models.config import load_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.request import RequestState, Status
from sparsed.engine.runner import Runner
from sparsed.engine.sampler import Sampler

pytestmark = pytest.mark.gpu

MACHINE = MachineFacts(
    cpu_name="any",
    num_cpus=2,
    dram_total_bytes=16 * GIB,
    dram_free_bytes=8 * GIB,
    hbm_total_bytes=16 * GIB,
    hbm_free_bytes=16 * GIB,
)


def make_runner(model: Path, device: str, dtype: str, knobs: Mapping[str, object]) -> Runner:
    shape = load_config(model).shape
    asked = {"kv_dram_gib": 1.0, "kv_hbm_gib": 1.0, "max_num_seqs": 4, **knobs}
    resolved = resolve_knobs(asked, shape=shape, machine=MACHINE, device=device, dtype=dtype)
    plan = plan_memory(resolved, shape=shape, dtype=dtype)
    spec = EngineSpec(
        model=str(model),
        device=device,
        dtype=dtype,
        knobs=resolved,
        plan=plan,
        always_select=True,
    )
    return Runner(spec, on_progress=lambda phase, frac: None)


def teacher_forced(
    runner: Runner,
    tokens: Sequence[int],
    num_prompt: int,
    chunk: int,
    method: SparseMethod = SparseMethod.CUBOID_MEAN,
) -> Tensor:
    """Logits of every position from the last prompt token on."""
    row = runner.kv.add(len(tokens), method=method, token_budget=None)
    logits = []
    for start in range(0, num_prompt, chunk):
        part = PromptChunk(
            row=row,
            tokens=tuple(tokens[start : min(start + chunk, num_prompt)]),
            start=start,
            prompt_length=num_prompt,
            logits_from=num_prompt - 1,
        )
        logits.append(runner.run(StepPlan(chunks=(part,), decodes=())).logits_NV.clone())
    for position in range(num_prompt, len(tokens)):
        decode = DecodeRow(row=row, token=tokens[position], position=position)
        logits.append(runner.run(StepPlan(chunks=(), decodes=(decode,))).logits_NV.clone())
    runner.kv.check_integrity()
    runner.kv.free(row)
    return torch.cat(logits).cpu()


@pytest.mark.parametrize("page_size", [8, 32, 128])
@pytest.mark.parametrize("hbm_budget", [None, 512])
@pytest.mark.parametrize("stride", [1, 5])
def test_float32_agrees_with_the_cpu(
    tiny_checkpoint: Callable[..., Path], page_size: int, hbm_budget: int | None, stride: int
) -> None:
    model = tiny_checkpoint("llama", max_position_embeddings=2048)
    tokens = torch.randint(0, 64, (1200,), generator=torch.Generator().manual_seed(1)).tolist()
    token_budget = 512 if page_size == 128 else 256
    knobs = {
        "page_size": page_size,
        "hbm_budget": hbm_budget,
        "token_budget": token_budget,
        "retrieval_stride": stride,
    }
    on_cpu = make_runner(model, "cpu", "float32", knobs)
    on_gpu = make_runner(model, "cuda:0", "float32", knobs)
    expected = teacher_forced(on_cpu, tokens, 1100, 300)
    torch.testing.assert_close(
        teacher_forced(on_gpu, tokens, 1100, 300), expected, atol=2e-3, rtol=1e-3
    )
    mine, theirs = on_gpu.stats(), on_cpu.stats()
    assert mine.hot_hits + mine.hot_misses == theirs.hot_hits + theirs.hot_misses
    assert abs(mine.hot_misses - theirs.hot_misses) <= 0.02 * theirs.hot_misses + 4


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="with one GPU there is no second to compare with"
)
def test_an_engine_on_the_second_gpu_gives_what_it_gives_on_the_first(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    model = tiny_checkpoint("llama", max_position_embeddings=2048)
    tokens = torch.randint(0, 64, (1200,), generator=torch.Generator().manual_seed(1)).tolist()
    knobs = {"page_size": 32, "hbm_budget": 512, "token_budget": 256}
    current = torch.cuda.current_device()
    try:
        logits = [
            teacher_forced(make_runner(model, device, "float32", knobs), tokens, 1100, 300)
            for device in ("cuda:0", "cuda:1")
        ]
    finally:
        torch.cuda.set_device(current)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("own", "knob", "value"),
    [(None, "token_budget", 512), (1024, "token_budget", 512), (None, "retrieval_stride", 5)],
)
def test_graphs_recorded_between_steps_change_no_logits(
    tiny_checkpoint: Callable[..., Path], own: int | None, knob: str, value: int
) -> None:
    """A knob is raised and lowered again beside a request, which follows it or has a larger budget
    of its own; the CPU takes each change when the GPU is ready for it."""
    model = tiny_checkpoint("llama", max_position_embeddings=2048)
    knobs = {"page_size": 8, "token_budget": 256, "sparse_method": "cuboid-mean"}
    runners = [make_runner(model, device, "float32", knobs) for device in ("cpu", "cuda:0")]
    tokens = torch.randint(0, 64, (1300,), generator=torch.Generator().manual_seed(1)).tolist()
    chunk = PromptChunk(
        row=0, tokens=tuple(tokens[:1100]), start=0, prompt_length=1100, logits_from=1099
    )
    for runner in runners:
        runner.kv.add(len(tokens), method=SparseMethod.CUBOID_MEAN, token_budget=own)
        runner.run(StepPlan(chunks=(chunk,), decodes=()))
    start = in_force = wanted = runners[0].kv._knobs
    changes = {1105: replace(start, **{knob: value}), 1200: start}
    for position in range(1100, 1300):
        if position in changes:
            wanted = changes[position]
            for runner in runners:
                runner.ask(wanted)
        runners[1].prepare(idle=True)
        if wanted != in_force and runners[1].readiness == 1.0:
            for runner in runners:
                runner.apply(wanted)
            in_force = wanted
        decode = DecodeRow(row=0, token=tokens[position], position=position)
        expected, got = (runner.run(StepPlan(chunks=(), decodes=(decode,))) for runner in runners)
        torch.testing.assert_close(got.logits_NV.cpu(), expected.logits_NV, atol=2e-3, rtol=1e-3)
    steps = runners[1].steps
    assert in_force == start
    assert steps is not None and steps.replays and not runners[1].is_preparing
    assert steps.last.pages == (own or 256) // 8 - 1
    assert steps.last.keeps == (knob == "retrieval_stride")


@pytest.mark.parametrize("method", [SparseMethod.DENSE, SparseMethod.CUBOID_MEAN])
def test_a_step_draws_as_it_is_asked_and_feeds_what_it_drew(
    tiny_checkpoint: Callable[..., Path], method: SparseMethod
) -> None:
    """In the captured graph, and, where pages are selected, in steps that are launched one by one;
    ``ahead`` never hears of its tokens, ``told`` is given them."""
    model = tiny_checkpoint("llama", max_position_embeddings=2048)
    ahead, told = (make_runner(model, "cuda:0", "float32", {"token_budget": 256}) for _ in range(2))
    hot = DrawParams(seed=5, token_index=0, temperature=1.5, top_p=0.9, min_p=0.01, top_k=40)
    asked = [hot, None, hot._replace(seed=6, top_p=1.0, top_k=0)]
    start = 400
    rows = [ahead.kv.add(start + 60, method=method, token_budget=None) for _ in asked]
    assert rows == [told.kv.add(start + 60, method=method, token_budget=None) for _ in asked]
    chunks = tuple(
        PromptChunk(
            row=row,
            tokens=tuple(range(row, start // 2 + row)) * 2,
            start=0,
            prompt_length=start,
            logits_from=start - 1,
            draw=one,
        )
        for row, one in zip(rows, asked, strict=True)
    )
    tokens = check_draws(ahead, told, [StepPlan(chunks=chunks, decodes=())] * 2, asked)
    for step in range(1, 40):
        asked = [one and one._replace(token_index=step) for one in asked]
        plans = [
            StepPlan(
                chunks=(),
                decodes=tuple(
                    DecodeRow(row=row, token=token, position=start + step - 1, draw=one)
                    for row, token, one in zip(rows, known, asked, strict=True)
                ),
            )
            for known in ([None] * len(rows), tokens)
        ]
        tokens = check_draws(ahead, told, plans, asked)


def check_draws(
    ahead: Runner, told: Runner, plans: Sequence[StepPlan], asked: Sequence[DrawParams | None]
) -> list[int]:
    drawn, again = ahead.run(plans[0]), told.run(plans[1])
    expected = draw(drawn.logits_NV.contiguous(), draws=asked).tolist()
    assert drawn.tokens_N.tolist() == again.tokens_N.tolist() == expected
    return expected


def test_the_sampler_draws_alike_on_both_devices() -> None:
    logits_NV = torch.randn(40, 5000, generator=torch.Generator().manual_seed(3)) * 3
    requests = [
        RequestState(
            request=AddRequest(
                request_id=str(row),
                prompt_tokens=(1, 2),
                sampling=SamplingParams(
                    max_tokens=9,
                    temperature=row % 4 / 2,
                    top_p=1 - row % 3 / 10,
                    top_k=row % 5 * 10,
                    presence_penalty=row % 2,
                    logit_bias=((row, 5.0),),
                    logprobs=1,
                ),
            ),
            seed=row,
            status=Status.DECODE,
            tokens=[3, 4],
        )
        for row in range(40)
    ]
    on_cpu = Sampler().sample(logits_NV, requests=requests)
    on_gpu = Sampler().sample(logits_NV.cuda(), requests=requests)
    assert [one.token_id for one in on_gpu] == [one.token_id for one in on_cpu]


@pytest.mark.parametrize("sparse_method", ["dense", "cuboid-mean", "quest"])
def test_the_real_model_in_half_precision_agrees_with_float32(
    smollm2: Path, sparse_method: str
) -> None:
    tokens = torch.randint(0, 49152, (2100,), generator=torch.Generator().manual_seed(2)).tolist()
    knobs = {"sparse_method": sparse_method, "token_budget": 1024}

    def logits(dtype: str) -> Tensor:
        runner = make_runner(smollm2, "cuda:0", dtype, knobs)
        return teacher_forced(runner, tokens, 2000, 512, SparseMethod(sparse_method))

    exact, half = logits("float32"), logits("bfloat16")
    divergence = torch.nn.functional.kl_div(
        half.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert float(divergence) < 0.05
