"""Tokens on a CUDA device: float32 ones are the same however they are computed, bfloat16 ones
differ at near ties alone; and steps that decode never wait for the device."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsed.core import (
    GIB,
    NO_RECALL,
    AddRequest,
    EngineSpec,
    LinkCalibration,
    MachineFacts,
    SamplingParams,
    Service,
    SparseMethod,
    SparseOptions,
    TokenOutput,
    VerifyMode,
)
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.engine import Engine
from sparsed.engine.models.config import load_config
from sparsed.engine.models.dummy import DUMMY_PREFIX, dummy_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
NUM_TOKENS = 200
LENGTHS = (1, 300, 31, 64, 100, 129, 500, 257)
NEAR_TIE = 1e-3  # of float32 logits; sums in another order differ by a hundredth of it
MAX_HALF_ERROR = 1.0  # of bfloat16 logits: more is a defect, not rounding
MACHINE = MachineFacts(
    cpu_name="any",
    num_cpus=2,
    dram_total_bytes=16 * GIB,
    dram_free_bytes=8 * GIB,
    hbm_total_bytes=16 * GIB,
    hbm_free_bytes=16 * GIB,
)

MakeRunner = Callable[..., Runner]


@pytest.fixture(scope="module")
def make_runner() -> MakeRunner:
    """``make_runner(model, dtype="float32", enforce_eager=, verify_kv=, lane_blocks=, **knobs)`` ->
    a runner for up to 8 requests, all resident unless ``lane_blocks`` shrinks the arena to so many
    blocks a lane; the link is measured once."""
    known: LinkCalibration | None = None

    def make(
        model: str | Path,
        dtype: str = "float32",
        *,
        enforce_eager: bool = False,
        verify_kv: VerifyMode = VerifyMode.OFF,
        lane_blocks: int | None = None,
        **knobs: Any,
    ) -> Runner:
        nonlocal known
        dummy = str(model).startswith(DUMMY_PREFIX)
        shape = (dummy_config(str(model)) if dummy else load_config(Path(model))).shape
        asked = {"max_num_seqs": 8, "max_model_len": 1024, "token_budget": 2048, **knobs}
        resolved = resolve_knobs(asked, shape=shape, machine=MACHINE, device=DEVICE, dtype=dtype)
        plan = plan_memory(resolved, shape=shape, dtype=dtype)
        if lane_blocks is not None:
            plan = replace(plan, num_blocks=1 + lane_blocks * shape.num_lanes)
        spec = EngineSpec(
            model=str(model),
            device=DEVICE,
            dtype=dtype,
            knobs=resolved,
            plan=plan,
            enforce_eager=enforce_eager,
            always_select=True,
            verify_kv=verify_kv,
            calibration=known,
        )
        runner = Runner(spec, on_progress=lambda phase, frac: None)
        known = runner.facts.calibration or known
        return runner

    return make


def engine_of(runner: Runner) -> Engine:
    # Without the quality breaker: which steps are sampled depends on the company.
    return Engine(runner, knobs=runner.kv._knobs, service=Service(recall_floor=0.0))


def request(name: str, prompt: Sequence[int], count: int, **params: Any) -> AddRequest:
    return AddRequest(
        request_id=name,
        prompt_tokens=tuple(prompt),
        sampling=SamplingParams(**{"max_tokens": count, "temperature": 0.0, **params}),
    )


def run(engine: Engine, requests: Sequence[AddRequest]) -> dict[str, list[TokenOutput]]:
    """The outputs of each request; one comes every second step, so that some decode while the
    prompts of others are computed."""
    found: dict[str, list[TokenOutput]] = {one.request_id: [] for one in requests}
    waiting = list(requests)
    for step in range(10**6):
        if waiting and step % 2 == 0:
            engine.add(waiting.pop(0))
        if not (waiting or engine.has_work):
            break
        for output in engine.step().outputs:
            assert output.error is None, output.error
            found[output.request_id].append(output)
    return found


def text(outputs: Sequence[TokenOutput]) -> list[int]:
    return [output.token_id for output in outputs if output.token_id is not None]


# -- float32: graphs, batches and chunks change no token -----------------------------------------


@dataclass(frozen=True)
class Expected:
    """What a request gets alone, every operation launched and every token drawn on the host."""

    tokens: list[int]
    gaps: list[float]  # between the best two logits of each token


def expected_alone(runner: Runner, requests: Sequence[AddRequest]) -> dict[str, Expected]:
    engine = engine_of(runner)
    found = {}
    for one in requests:
        asked = replace(one, sampling=replace(one.sampling, logprobs=2))
        outputs = run(engine, [asked])[one.request_id]
        best = [[entry.logprob for entry in output.top_logprobs[:2]] for output in outputs]
        found[one.request_id] = Expected(text(outputs), [first - second for first, second in best])
    return found


def assert_same_texts(
    found: dict[str, list[TokenOutput]],
    expected: dict[str, Expected],
    *,
    what: str,
    near_tie: float = NEAR_TIE,
) -> None:
    """Equal to the last token; one text of all may leave the other's way, at a near tie."""
    ties = 0
    for name, alone in expected.items():
        tokens = text(found[name])
        assert len(tokens) == len(alone.tokens)
        pairs = zip(tokens, alone.tokens, strict=True)
        index = next((i for i, (mine, other) in enumerate(pairs) if mine != other), None)
        if index is not None:
            gap = alone.gaps[index]
            assert gap < near_tie, f"{what}: {name} differs at token {index}, gap {gap:.1e}"
            ties += 1
    assert ties <= 1, f"{what}: {ties} texts differ"


def prompts(vocab_size: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [
        tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())
        for length in LENGTHS
    ]


@pytest.fixture(params=["dummy:tiny", "llama", "qwen2", "qwen3", "smollm2"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> str | Path:
    """Qwen2 has biases of attention, Qwen3 norms of queries and keys."""
    if request.param.startswith(DUMMY_PREFIX):
        return str(request.param)
    if request.param == "smollm2":
        directory: Path = request.getfixturevalue("smollm2")
        return directory
    return tiny_checkpoint(request.param, max_position_embeddings=2048)


def test_float32_tokens_are_the_same_however_they_are_computed(
    make_runner: MakeRunner, model: str | Path
) -> None:
    """Captured or launched, alone or together, prompts whole or in chunks, tokens known to the
    device alone or drawn on the host."""
    eager = make_runner(model, enforce_eager=True)
    requests = [
        request(str(i), prompt, NUM_TOKENS) for i, prompt in enumerate(prompts(eager.vocab_size))
    ]
    expected = expected_alone(eager, requests)
    assert_same_texts(run(engine_of(eager), requests), expected, what="eager, together")
    del eager
    graphs = make_runner(model)
    alone: dict[str, list[TokenOutput]] = {}
    for one in requests[1::3]:
        alone |= run(engine_of(graphs), [one])
    assert_same_texts(alone, {name: expected[name] for name in alone}, what="graphs, alone")
    for chunk in (64, 512):
        engine = engine_of(graphs)
        engine.apply(replace(engine.knobs, prefill_chunk=chunk))
        assert_same_texts(run(engine, requests), expected, what=f"graphs, chunks of {chunk}")
    mixed = [
        replace(one, sampling=replace(one.sampling, logprobs=0)) if i % 2 else one
        for i, one in enumerate(requests)
    ]
    noise = request("noise", requests[0].prompt_tokens, NUM_TOKENS, temperature=1.0, seed=1)
    found = run(engine_of(graphs), [noise, *mixed])
    assert_same_texts(found, expected, what="graphs, every other token drawn on the host")
    graphs.kv.check_integrity()


def test_a_replay_on_the_device_goes_on_with_the_same_text(
    make_runner: MakeRunner, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Known tokens are fed from the host, those after them from the device."""
    runner = make_runner(tiny_checkpoint("llama", max_position_embeddings=2048))
    requests = [
        request(str(i), prompt, NUM_TOKENS) for i, prompt in enumerate(prompts(runner.vocab_size))
    ]
    whole = run(engine_of(runner), requests)
    for count in (1, 31, 120):
        known = [
            replace(one, generated_tokens=tuple(text(whole[one.request_id])[:count]))
            for one in requests
        ]
        replayed = run(engine_of(runner), known)
        for name, outputs in replayed.items():
            assert text(outputs) == text(whole[name])[count:]
            assert [output.index for output in outputs] == list(range(count, NUM_TOKENS))


# -- bfloat16: what rounding cannot explain does not happen --------------------------------------


def teacher_forced(runner: Runner, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits (n, V) of every one of ``tokens``, each given those before it."""
    row = runner.kv.add(len(prompt) + len(tokens), method=SparseMethod.DENSE, token_budget=None)
    chunk = PromptChunk(
        row=row,
        tokens=tuple(prompt),
        start=0,
        prompt_length=len(prompt),
        logits_from=len(prompt) - 1,
    )
    logits = [runner.run(StepPlan(chunks=(chunk,), decodes=())).logits_NV.clone()]
    for position, token in enumerate(tokens[:-1], len(prompt)):
        decode = DecodeRow(row=row, token=token, position=position)
        logits.append(runner.run(StepPlan(chunks=(), decodes=(decode,))).logits_NV.clone())
    runner.kv.free(row)
    return torch.cat(logits).cpu()


def half_error(exact: Runner, half: Runner, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """The most that a logit of the eight best tokens is off."""
    exact_nV, half_nV = (teacher_forced(runner, prompt, tokens) for runner in (exact, half))
    best = exact_nV.topk(8, dim=-1)
    return float((half_nV.gather(-1, best.indices) - best.values).abs().max())


def num_excused(engine: Engine, prompt: Sequence[int], expected: Expected, bound: float) -> int:
    """Tokens that differ, all of them where the best two logits are closer than ``bound``. After
    each one the text goes on from the expected token."""
    count = start = 0
    while start < len(expected.tokens):
        one = request("half", prompt, len(expected.tokens))
        known = replace(one, generated_tokens=tuple(expected.tokens[:start]))
        tokens = expected.tokens[:start] + text(run(engine, [known])["half"])
        pairs = enumerate(zip(tokens, expected.tokens, strict=True))
        index = next((i for i, (mine, other) in pairs if mine != other), None)
        if index is None:
            return count
        gap = expected.gaps[index]
        assert gap < bound, f"token {index} differs, gap {gap:.2f}, bound {bound:.2f}"
        count, start = count + 1, index + 1
    return count


@cache
def reference_text(directory: Path) -> tuple[int, ...]:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    parts = [topics[name] for name in ("with", "class", "import", "operator-summary", "try")]
    return tuple(tokenizer.encode("\n\n".join(parts)).ids)


def test_bfloat16_tokens_differ_at_near_ties_alone(make_runner: MakeRunner, smollm2: Path) -> None:
    """The error of a logit is measured on two texts, and holds for three others; the gap of two
    logits may be off by twice as much."""
    exact, half = (make_runner(smollm2, dtype) for dtype in ("float32", "bfloat16"))
    words = reference_text(smollm2)
    assert len(words) > 5 * 600
    pieces = [words[600 * i :][: 150 + 100 * i] for i in range(5)]
    requests = [request(str(i), piece, NUM_TOKENS) for i, piece in enumerate(pieces)]
    expected = list(expected_alone(exact, requests).values())
    measured = zip(pieces[:2], expected[:2], strict=True)
    error = max(half_error(exact, half, piece, alone.tokens) for piece, alone in measured)
    assert error < MAX_HALF_ERROR
    engine, bound = engine_of(half), 2 * error
    excused = sum(
        num_excused(engine, piece, alone, bound)
        for piece, alone in zip(pieces[2:], expected[2:], strict=True)
    )
    gaps = [gap for alone in expected[2:] for gap in alone.gaps]
    near = sum(gap < bound for gap in gaps)
    print(
        f"bfloat16: logits off by at most {error:.2f}; {near} of {len(gaps)} tokens are near ties, "
        f"{excused} of them differ from float32"
    )
    assert excused <= 0.05 * len(gaps)
    assert near < 0.5 * len(gaps), "the error is so large that nothing was shown"


# -- decode never waits for the device -----------------------------------------------------------


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """RuntimeError for any operation of torch that waits for the device. Waiting for an event, as
    the reading of tokens does, is not counted: ``torch.cuda.Event.synchronize`` goes past the
    check (c10/cuda/CUDAFunctions.h has it, ATen/cuda/CUDAEvent.h has not)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_for_synchronisation_finds_one() -> None:
    ones = torch.ones(3, device=DEVICE)
    event = torch.cuda.Event()
    with no_synchronisation():
        event.record()
        event.synchronize()
        with pytest.raises(RuntimeError, match="synchronizing"):
            ones.sum().item()
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.tensor([1, 2, 3], device=DEVICE)


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("verify_kv", [VerifyMode.OFF, VerifyMode.FULL])
@pytest.mark.parametrize("sparse_method", ["dense", "cuboid-mean", "mean-key"])
def test_steps_that_decode_do_not_wait_for_the_device(
    make_runner: MakeRunner, enforce_eager: bool, verify_kv: VerifyMode, sparse_method: str
) -> None:
    """Greedy requests whose KV is hot, over ends of pages and of blocks: only the tokens of the
    step before are waited for."""
    runner = make_runner(
        "dummy:tiny",
        "bfloat16",
        enforce_eager=enforce_eager,
        verify_kv=verify_kv,
        sparse_method=sparse_method,
        page_size=32,
    )
    engine = engine_of(runner)
    lengths = (5, 200, 17, 120)
    for i, length in enumerate(lengths):
        engine.add(request(str(i), [7 + i] * length, 400))
    for _ in range(140):  # every page and block has ended once: nothing is compiled any more
        engine.step()
    torch.cuda.synchronize()
    found = []
    with no_synchronisation():
        for _ in range(140):
            found.append(len(engine.step().outputs))
    assert found == [len(lengths)] * 140
    while engine.has_work:
        engine.step()
    engine.stats()  # a busy device may answer the next call only
    torch.cuda.synchronize()
    stats = engine.stats()
    assert stats.verify_mismatches == 0
    assert (stats.verify_checked_pages > 0) == (verify_kv is VerifyMode.FULL)


# -- sparse decode over two tiers: the same tokens wherever the pages lie ---------------------------

LONG_LENGTHS = (700, 90, 1300, 400, 1024, 801, 3, 655)
TIER_KNOBS = {"max_model_len": 2048, "token_budget": 256, "sparse_method": "mean-key"}
LANE_BLOCKS = 30  # a few more than the selections of all requests take


def sparse_requests(vocab_size: int) -> list[AddRequest]:
    generator = torch.Generator().manual_seed(11)
    return [
        request(
            str(i),
            torch.randint(3, vocab_size, (length,), generator=generator).tolist(),
            NUM_TOKENS,
        )
        for i, length in enumerate(LONG_LENGTHS)
    ]


def settled(runner: Runner) -> Runner:
    """Once the device is idle, so that counters are those of now."""
    torch.cuda.synchronize()
    runner.stats()
    torch.cuda.synchronize()
    return runner


@pytest.fixture(params=["dummy:tiny", "llama", "smollm2"])
def sparse_model(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]
) -> str | Path:
    if request.param == "smollm2":
        directory: Path = request.getfixturevalue("smollm2")
        return directory
    if request.param == "llama":
        return tiny_checkpoint("llama", max_position_embeddings=4096)
    return str(request.param)


@pytest.mark.parametrize("page_size", [8, 32])
def test_float32_tokens_are_the_same_wherever_the_pages_lie(
    make_runner: MakeRunner, sparse_model: str | Path, page_size: int
) -> None:
    """Launched one by one or captured, alone or together, all hot or most pages in DRAM. A tie of
    two pages at the end of a selection is one that the gap of two tokens does not show."""
    knobs = {**TIER_KNOBS, "page_size": page_size}
    eager = make_runner(sparse_model, enforce_eager=True, **knobs)
    requests = sparse_requests(eager.vocab_size)
    expected = expected_alone(eager, requests)
    del eager
    hot = make_runner(sparse_model, **knobs)
    assert_same_texts(
        run(engine_of(hot), requests), expected, what="graphs, all hot", near_tie=math.inf
    )
    assert settled(hot).stats().hot_misses == 0
    del hot
    cold = make_runner(sparse_model, lane_blocks=LANE_BLOCKS, verify_kv=VerifyMode.FULL, **knobs)
    assert_same_texts(
        run(engine_of(cold), requests), expected, what="graphs, two tiers", near_tie=math.inf
    )
    stats = settled(cold).stats()
    assert stats.hot_misses > 0 and stats.evicted_pages > 0 and stats.overflow_pages == 0
    assert stats.verify_checked_pages > 0 and stats.verify_mismatches == 0
    cold.kv.check_integrity()


def test_sparse_steps_do_not_wait_for_the_device(make_runner: MakeRunner) -> None:
    """But for samples of attention recall, of which there are none here; with timed steps, and
    asked for figures all the time."""
    runner = make_runner(
        "dummy:tiny", "bfloat16", lane_blocks=LANE_BLOCKS, page_size=8, **TIER_KNOBS
    )
    runner.attention.tiers.recall_stride = NO_RECALL
    runner.fetch_times.stride = 3
    engine = engine_of(runner)
    for one in sparse_requests(runner.vocab_size)[:4]:
        engine.add(replace(one, sampling=replace(one.sampling, max_tokens=400)))
    for _ in range(140):
        engine.step()
        engine.stats()
    torch.cuda.synchronize()
    found, timed_steps = [], runner.fetch_times.steps
    with no_synchronisation():
        for _ in range(140):
            found.append(len(engine.step().outputs))
            engine.stats()
    assert found == [4] * 140
    assert 20 < runner.fetch_times.steps - timed_steps <= 47
    while engine.has_work:
        engine.step()
    assert settled(runner).stats().hot_misses > 0


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_timed_steps_change_no_token_and_tell_what_fetches_take(
    make_runner: MakeRunner, looks_ahead: bool
) -> None:
    knobs = {**TIER_KNOBS, "page_size": 8}
    eager = make_runner("dummy:tiny", enforce_eager=True, **knobs)
    requests = sparse_requests(eager.vocab_size)
    expected = expected_alone(eager, requests)
    del eager
    runner = make_runner("dummy:tiny", lane_blocks=LANE_BLOCKS, **knobs)
    runner.attention.tiers.recall_stride = runner.fetch_times.stride = NO_RECALL
    runner.look_ahead(looks_ahead)
    assert_same_texts(run(engine_of(runner), requests), expected, what="not timed")
    before = settled(runner).stats()
    assert before.timed_steps == 0 == before.exposed_s
    runner.fetch_times.stride = 3
    started_s = time.perf_counter()
    assert_same_texts(run(engine_of(runner), requests), expected, what="timed")
    stats = settled(runner).stats()
    run_s = time.perf_counter() - started_s
    assert stats.timed_steps > NUM_TOKENS // 6
    assert 0 <= stats.exposed_s < run_s, "fetches so small may be there before they are needed"
    # What the run before has fetched gets its seconds too.
    fetched_gb, fetched_s = (stats.h2d_bytes - before.h2d_bytes) / 1e9, stats.h2d_s - before.h2d_s
    print(
        f"{fetched_gb:.4f} GB and what came before, {fetched_s * 1e3:.1f} ms; exposed "
        f"{1e6 * stats.exposed_s / stats.timed_steps:.1f} us a step; {stats.foreseen_pages} "
        f"foreseen, {stats.wasted_pages} for nothing, {stats.hot_misses} missed"
    )
    assert fetched_s > 0 and fetched_gb / fetched_s < 200
    assert (stats.foreseen_pages > stats.wasted_pages > 0) == looks_ahead
    assert not looks_ahead or stats.foreseen_pages > 0


def test_recall_is_the_same_wherever_the_pages_lie(make_runner: MakeRunner) -> None:
    """Samples of captured steps, read late: through the staging area for what is cold."""
    means = []
    for lane_blocks in (None, LANE_BLOCKS):
        runner = make_runner("dummy:tiny", lane_blocks=lane_blocks, page_size=8, **TIER_KNOBS)
        runner.attention.tiers.recall_stride = 4
        run(engine_of(runner), sparse_requests(runner.vocab_size))
        stats = settled(runner).stats()
        assert stats.recall_samples > NUM_TOKENS // 8
        means.append(stats.recall_sum / stats.recall_samples)
        assert stats.working_set_pages == 0, "all requests have ended"
    assert 0.1 < means[0] < 0.9999
    assert means[1] == pytest.approx(means[0], abs=1e-3)


def test_requests_of_other_budgets_run_beside(make_runner: MakeRunner) -> None:
    """A larger budget than the graphs were made for goes another way, to the same end."""
    runner = make_runner("dummy:tiny", page_size=8, **TIER_KNOBS)
    requests: Sequence[AddRequest] = [
        replace(one, sparse=SparseOptions(token_budget=budget))
        for one, budget in zip(
            sparse_requests(runner.vocab_size)[:4], (None, None, 512, None), strict=True
        )
    ]
    expected = expected_alone(runner, requests)
    assert_same_texts(run(engine_of(runner), requests), expected, what="mixed budgets")
