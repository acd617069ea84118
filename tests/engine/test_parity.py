"""The same tokens as transformers, whatever the page size, chunks, company or tiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsed.core import (
    PAGE_SIZES,
    AddRequest,
    EngineSpec,
    FinishReason,
    SamplingParams,
    SparseMethod,
    SparseMode,
    SparseOptions,
    TokenOutput,
)
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.decode import sampled_layer, sampled_turn
from sparsed.engine.engine import Engine
from sparsed.engine.models.config import FAMILIES
from sparsed.engine.models.rope_config import ROPE_KINDS
from sparsed.engine.runner import Runner

TinyCheckpoint = Callable[..., Path]
MakeRunner = Callable[..., Runner]
MakeSpec = Callable[..., EngineSpec]
MakeEngine = Callable[..., Engine]
Oracle = Callable[..., list[int]]

NUM_TOKENS = 100  # over 300 of a prompt: a page of every size fills
SPARSE_METHODS = tuple(method for method in SparseMethod if method != SparseMethod.DENSE)


def tokens_of(count: int, *, seed: int = 0, vocab_size: int = 320) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size, (count,), generator=generator).tolist())


def request(
    name: str,
    prompt: Sequence[int],
    count: int = NUM_TOKENS,
    *,
    generated: Sequence[int] = (),
    mode: SparseMode = SparseMode.AUTO,
    budget: int | None = None,
) -> AddRequest:
    return AddRequest(
        request_id=name,
        prompt_tokens=tuple(prompt),
        sampling=SamplingParams(max_tokens=count, temperature=0.0),
        sparse=SparseOptions(mode=mode, token_budget=budget),
        generated_tokens=tuple(generated),
    )


def run(engine: Engine, *requests: AddRequest) -> list[TokenOutput]:
    """All outputs, the requests being there from the start."""
    for one in requests:
        engine.add(one)
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs.extend(engine.step().outputs)
    return outputs


def text(outputs: Sequence[TokenOutput], name: str = "a") -> list[int]:
    mine = [output for output in outputs if output.request_id == name]
    assert mine[-1].error is None
    return [output.token_id for output in mine if output.token_id is not None]


def greedy(engine: Engine, prompt: Sequence[int], count: int = NUM_TOKENS) -> list[int]:
    return text(run(engine, request("a", prompt, count)))


def teacher_forced(
    runner: Runner, tokens: Sequence[int], num_prompt: int, *, chunk: int = 300
) -> Tensor:
    """Logits of every position from the last prompt token on."""
    method = SparseMethod(runner.kv._knobs.sparse_method)
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
    assert len(runner.kv.arena.blocks) == runner.kv.arena.blocks.size
    return torch.cat(logits)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """transformers' own greedy generation, which never stops early; models are loaded, texts made
    once."""
    from transformers import AutoModelForCausalLM

    models: dict[Path, Any] = {}

    def load(directory: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        model.generation_config.eos_token_id = None
        return model.eval()

    @cache
    def generate(directory: Path, prompt: tuple[int, ...], count: int = NUM_TOKENS) -> list[int]:
        if directory not in models:
            models[directory] = load(directory)
        tokens_1N = torch.tensor([prompt])
        found = models[directory].generate(
            tokens_1N,
            attention_mask=torch.ones_like(tokens_1N),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return list(found[0, len(prompt) :].tolist())

    return generate


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def llama_text(llama: Path, oracle: Oracle) -> list[int]:
    """What follows ``tokens_of(300)``."""
    return oracle(llama, tokens_of(300))


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPE_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_rope_variant(
    tiny_checkpoint: TinyCheckpoint, make_engine: MakeEngine, oracle: Oracle, family: str, rope: str
) -> None:
    """Linear and dynamic scaling by 4 stretch 128 positions to the 512 of the others."""
    trained = 128 if rope in ("linear", "dynamic") else 512
    directory = tiny_checkpoint(family, rope, max_position_embeddings=trained)
    prompt = tokens_of(150, seed=5)
    engine = make_engine(directory, max_model_len=512, prefill_chunk=100)
    assert greedy(engine, prompt) == oracle(directory, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("prefill_chunk", [37, 100, 2048])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_page_size_and_chunk(
    make_engine: MakeEngine,
    llama: Path,
    llama_text: list[int],
    page_size: int,
    prefill_chunk: int,
) -> None:
    engine = make_engine(llama, page_size=page_size, prefill_chunk=prefill_chunk)
    assert greedy(engine, tokens_of(300)) == llama_text


@pytest.mark.slow
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_that_do_not_fit_the_hot_tier(
    make_engine: MakeEngine, llama: Path, llama_text: list[int], page_size: int
) -> None:
    """Two blocks a lane for up to four: every step attends in passes through the staging."""
    engine = make_engine(llama, lane_blocks=2, page_size=page_size, prefill_chunk=100)
    assert greedy(engine, tokens_of(300)) == llama_text
    stats = engine.stats()
    page_bytes = page_size * 2 * 16 * 4
    assert stats.h2d_bytes > NUM_TOKENS * 2 * 2 * (300 - 256) // page_size * page_bytes
    assert stats.d2h_bytes == (300 + NUM_TOKENS - 1) // page_size * 2 * 2 * page_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "budget", "lane_blocks"), [(SparseMode.AUTO, 1024, None), (SparseMode.OFF, 256, 8)]
)
def test_eight_requests_of_mixed_lengths(
    make_engine: MakeEngine,
    llama: Path,
    oracle: Oracle,
    mode: SparseMode,
    budget: int,
    lane_blocks: int | None,
) -> None:
    """Some come while others decode, and wait for room where dense ones do not fit together."""
    lengths = (1, 300, 31, 64, 100, 129, 500, 257)
    counts = (90, 40, 70, 33, 64, 20, 60, 50)
    requests = [
        request(str(i), tokens_of(length, seed=i), count, mode=mode)
        for i, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]
    engine = make_engine(
        llama, lane_blocks=lane_blocks, prefill_chunk=64, token_budget=budget, max_model_len=1024
    )
    outputs: list[TokenOutput] = []
    mixed = 0
    for one in requests:
        engine.add(one)
        for _ in range(3):
            before = engine.stats().prompt_tokens
            found = engine.step().outputs
            mixed += bool(found) and engine.stats().prompt_tokens > before
            outputs.extend(found)
    outputs += run(engine)
    assert mixed > 5, "prompts were computed beside decodes"
    for one in requests:
        expected = oracle(llama, one.prompt_tokens, one.sampling.max_tokens)
        assert text(outputs, one.request_id) == expected
    stats = engine.stats()
    assert (stats.hot_used_bytes, stats.dram_used_bytes) == (0, 0)
    assert stats.h2d_bytes == 0, "what runs is resident"


@pytest.mark.slow
@pytest.mark.parametrize(("lane_blocks", "count"), [(None, 64), (3, 32)])
def test_real_weights(
    make_engine: MakeEngine, smollm2: Path, oracle: Oracle, lane_blocks: int | None, count: int
) -> None:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    prompt = tuple(tokenizer.encode(topics["with"]).ids[:400])
    engine = make_engine(smollm2, lane_blocks=lane_blocks, prefill_chunk=100, kv_dram_gib=0.2)
    assert greedy(engine, prompt, count) == oracle(smollm2, prompt, 64)[:count]
    assert (engine.stats().h2d_bytes > 0) == (lane_blocks is not None)


# -- sparse attention: no transformers to compare with, but the tiers must not matter -----------


@pytest.mark.parametrize("sparse_method", SPARSE_METHODS)
@pytest.mark.parametrize("page_size", [8, 128])
def test_below_the_budget_sparse_is_dense_to_the_bit(
    make_runner: MakeRunner, llama: Path, page_size: int, sparse_method: SparseMethod
) -> None:
    """The token budget less one page, full pages; the last tokens fill that page."""
    tokens = tokens_of(512, seed=1)
    sizes = {"page_size": page_size, "token_budget": 512, "max_model_len": 1024}
    sparse = make_runner(llama, sparse_method=sparse_method, **sizes)
    dense = make_runner(llama, sparse_method=SparseMethod.DENSE, **sizes)
    expected = teacher_forced(dense, tokens, 450)
    assert torch.equal(teacher_forced(sparse, tokens, 450), expected)
    longer = tokens_of(513, seed=1)
    last = teacher_forced(sparse, longer, 450)
    assert torch.equal(last[:-1], expected)
    assert not torch.allclose(last[-1], teacher_forced(dense, longer, 450)[-1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sparse_method", SPARSE_METHODS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_sparse_on_small_tiers_is_sparse_on_large_ones(
    make_runner: MakeRunner, llama: Path, page_size: int, sparse_method: SparseMethod
) -> None:
    """Five blocks a lane hold the selection, and pages come and go; two do not hold it."""
    tokens = tokens_of(900, seed=2)
    values = {"page_size": page_size, "token_budget": 512, "sparse_method": sparse_method}
    resident, small, tiny = (
        make_runner(llama, lane_blocks=lane_blocks, **values) for lane_blocks in (None, 5, 2)
    )
    expected = teacher_forced(resident, tokens, 840)
    assert resident.stats().hot_hits > 0
    assert resident.stats().h2d_bytes == resident.stats().hot_misses == 0
    for runner in (small, tiny):
        logits = teacher_forced(runner, tokens, 840)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        assert runner.stats().hot_misses > 0
        assert runner.stats().evicted_pages > 0
        assert (runner.stats().overflow_pages > 0) == (runner is tiny)


def test_pages_that_a_new_one_displaces_are_evicted_too(
    make_runner: MakeRunner, llama: Path
) -> None:
    """Dense decode selects nothing: each new page takes the slot of another."""
    runner = make_runner(llama, lane_blocks=2, page_size=32, sparse_method=SparseMethod.DENSE)
    teacher_forced(runner, tokens_of(400, seed=2), 320)
    before = runner.stats().evicted_pages
    teacher_forced(runner, tokens_of(32 * 12, seed=2), 320)
    assert runner.stats().evicted_pages > before > 0


@pytest.mark.parametrize("dense_layers", [1, 2])
def test_dense_layers(make_runner: MakeRunner, llama: Path, dense_layers: int) -> None:
    """One dense layer of two: neither sparse nor dense. Two: dense. On every size of tier."""
    tokens = tokens_of(700, seed=4)
    sparse, dense, resident, small = (
        teacher_forced(make_runner(llama, token_budget=256, **values), tokens, 660)
        for values in (
            {},
            {"sparse_method": SparseMethod.DENSE},
            {"dense_layers": dense_layers},
            {"dense_layers": dense_layers, "lane_blocks": 3},
        )
    )
    torch.testing.assert_close(small, resident, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(resident[1:], sparse[1:], atol=1e-2)
    assert torch.equal(resident, dense) == (dense_layers == 2)


def test_tokens_read_are_a_mean_over_layers(make_engine: MakeEngine, llama: Path) -> None:
    """Two decode steps, at positions 700 and 701: one layer reads all, the other seven pages."""
    engine = make_engine(llama, token_budget=256, dense_layers=1)
    details = run(engine, request("a", tokens_of(700), 3))[-1].sparse
    assert details is not None
    assert details.tokens_read == (701 + 7 * 32 + 29) // 2 + (702 + 7 * 32 + 30) // 2
    assert details.tokens_dense == 701 + 702


def test_recall_is_measured_and_the_text_unchanged(make_runner: MakeRunner, llama: Path) -> None:
    """Every 32nd step reads everything, also what is not hot."""
    runner = make_runner(llama, token_budget=256, lane_blocks=3)
    teacher_forced(runner, tokens_of(800, seed=6), 600)
    stats = runner.stats()
    steps = range(4, 4 + 199)  # after three of the prompt
    assert stats.recall_samples == sum(sampled_turn(step, 32) is not None for step in steps) > 4
    assert 0.2 < stats.recall_sum / stats.recall_samples < 1.0


@pytest.mark.parametrize("num_layers", [1, 2, 30, 32, 36, 80])
def test_recall_visits_all_layers_far_from_each_other(num_layers: int) -> None:
    layers = [sampled_layer(turn, num_layers) for turn in range(2 * num_layers)]
    assert sorted(layers) == sorted([*range(num_layers)] * 2)
    for first in range(num_layers):
        places = sorted(layers[first : first + 8])
        gaps = [b - a for a, b in pairwise((*places, num_layers + places[0]))]
        assert max(gaps) <= max(num_layers / 3.5, 1)


@pytest.mark.parametrize("stride", [1, 7])
def test_an_engine_can_measure_recall_more_often(
    stride: int, make_spec: MakeSpec, llama: Path
) -> None:
    """As in trials, whose windows are short."""
    spec = replace(make_spec(llama, token_budget=256), recall_stride=stride)
    runner = Runner(spec, on_progress=lambda *_: None)
    teacher_forced(runner, tokens_of(610, seed=6), 600)
    num = sum(sampled_turn(step, stride) is not None for step in range(4, 14))
    assert runner.stats().recall_samples == num > 0


@pytest.mark.parametrize("lane_blocks", [None, 3])
@pytest.mark.parametrize("num_known", [0, 1, 31, 49])
def test_a_replay_goes_on_with_the_same_text(
    make_engine: MakeEngine, llama: Path, lane_blocks: int | None, num_known: int
) -> None:
    """Known tokens go through decode, sparse as they were: their pages come out the same."""
    prompt = tokens_of(600, seed=7)
    values = {"lane_blocks": lane_blocks, "token_budget": 256, "prefill_chunk": 250}
    undisturbed = run(make_engine(llama, **values), request("a", prompt, 50))
    whole = text(undisturbed)
    details = undisturbed[-1].sparse
    assert details is not None and details.sparse_steps == 49
    assert details.coverage is not None
    known = whole[:num_known]
    replayed = run(make_engine(llama, **values), request("a", prompt, 50, generated=known))
    assert text(replayed) == whole[num_known:]
    assert [output.index for output in replayed] == list(range(num_known, 50))
    assert replayed[-1].sparse == details, "the replay counts and measures the whole again"


@pytest.mark.slow
@pytest.mark.parametrize("lane_blocks", [None, 18])
def test_every_request_chooses_for_itself(
    make_engine: MakeEngine, llama: Path, lane_blocks: int | None
) -> None:
    """Budgets, dense and short requests in one batch; each text is that of the request alone."""
    requests = [
        request("knob", tokens_of(700, seed=1), 60),
        request("off", tokens_of(690, seed=2), 60, mode=SparseMode.OFF),
        request("small", tokens_of(650, seed=3), 60, budget=256),
        request("small too", tokens_of(500, seed=4), 60, budget=256),
        request("short", tokens_of(40, seed=5), 60),
    ]
    values = {"token_budget": 512, "max_model_len": 1024, "prefill_chunk": 300}
    engine = make_engine(llama, lane_blocks=lane_blocks, **values)
    outputs = run(engine, *requests)
    assert (engine.stats().hot_misses > 0) == (lane_blocks is not None)
    for one in requests:
        name, alone = one.request_id, run(make_engine(llama, **values), one)
        assert text(outputs, name) == text(alone, name)
        details = next(o.sparse for o in outputs if o.request_id == name and o.finish_reason)
        assert details is not None and alone[-1].sparse is not None
        assert details.tokens_read == alone[-1].sparse.tokens_read
        first, last = len(one.prompt_tokens) + 1, len(one.prompt_tokens) + 59
        assert details.tokens_dense == (first + last) * 59 // 2
        sparse = name not in ("off", "short")
        assert details.sparse_steps == (59 if sparse else 0)
        assert (details.tokens_read < details.tokens_dense) == sparse
        budget = one.sparse.token_budget or 512
        if sparse:  # full pages up to the budget less one page, and the partial page
            assert 59 * (budget - 32) < details.tokens_read <= 59 * budget
        method = SparseMethod.DENSE if name == "off" else SparseMethod.MEAN_KEY
        assert details.method == method


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request("bad", tokens_of(1000), 49), "1049 tokens exceeds max_model_len=1048"),
        (request("bad", tokens_of(800), 97), "exceeds the DRAM tier, which holds 896 tokens"),
        (request("bad", tokens_of(20), budget=100), "token_budget=100: allowed: 256 to 8192"),
        (request("bad", tokens_of(20), budget=256), "fewer than four pages of 128 tokens"),
    ],
)
def test_a_request_that_never_fits_harms_nobody(
    make_engine: MakeEngine, llama: Path, llama_text: list[int], bad: AddRequest, words: str
) -> None:
    engine = make_engine(llama, num_frames=7, max_model_len=1048, page_size=128)
    outputs = run(
        engine,
        request("before", tokens_of(300), 40),
        bad,
        request("after", tokens_of(300), 40),
        request("longest", tokens_of(800), 96),
    )
    (refusal,) = [output for output in outputs if output.request_id == "bad"]
    assert (refusal.token_id, refusal.finish_reason) == (None, FinishReason.ERROR)
    assert words in str(refusal.error)
    assert text(outputs, "before") == text(outputs, "after") == llama_text[:40]
    assert len(text(outputs, "longest")) == 96
