"""The engine on a CUDA device against itself on the CPU: same tokens, close logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsed.core import GIB, EngineSpec, MachineFacts, SparseMethod
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.models.config import load_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

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
    spec = EngineSpec(model=str(model), device=device, dtype=dtype, knobs=resolved, plan=plan)
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
def test_float32_agrees_with_the_cpu(
    tiny_checkpoint: Callable[..., Path], page_size: int, hbm_budget: int | None
) -> None:
    model = tiny_checkpoint("llama", max_position_embeddings=2048)
    tokens = torch.randint(0, 64, (1200,), generator=torch.Generator().manual_seed(1)).tolist()
    token_budget = 512 if page_size == 128 else 256
    knobs = {"page_size": page_size, "hbm_budget": hbm_budget, "token_budget": token_budget}
    on_cpu = make_runner(model, "cpu", "float32", knobs)
    on_gpu = make_runner(model, "cuda:0", "float32", knobs)
    expected = teacher_forced(on_cpu, tokens, 1100, 300)
    torch.testing.assert_close(
        teacher_forced(on_gpu, tokens, 1100, 300), expected, atol=2e-3, rtol=1e-3
    )
    mine, theirs = on_gpu.stats(), on_cpu.stats()
    assert mine.hot_hits + mine.hot_misses == theirs.hot_hits + theirs.hot_misses
    assert abs(mine.hot_misses - theirs.hot_misses) <= 0.02 * theirs.hot_misses + 4


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
