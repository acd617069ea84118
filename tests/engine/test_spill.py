"""Requests that are spilled and brought back: the same tokens as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sparsed.core import AddRequest, EngineSpec, SamplingParams, Service, SparseMethod, VerifyMode
from sparsed.engine import scheduler
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.engine import Engine
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.preemption import Held
from sparsed.engine.runner import Runner

MakeRunner = Callable[..., Runner]
MakeSpec = Callable[..., EngineSpec]

METHODS = (SparseMethod.QUEST, SparseMethod.DENSE)
OUTPUT = 60


class Request:
    """A prompt of random tokens and what was drawn after it; ``computed`` tokens are cached."""

    def __init__(self, name: int, *, num_prompt: int, method: SparseMethod) -> None:
        random = torch.Generator().manual_seed(name)
        self.method = method
        self.num_prompt = num_prompt
        self.tokens = torch.randint(3, 200, (num_prompt,), generator=random).tolist()
        self.computed = 0

    @property
    def is_done(self) -> bool:
        return len(self.tokens) == self.num_prompt + OUTPUT

    def entry(self, row: int, chunk: int) -> PromptChunk | DecodeRow:
        if self.computed < self.num_prompt:
            end = min(self.computed + chunk, self.num_prompt)
            return PromptChunk(
                row=row,
                tokens=tuple(self.tokens[self.computed : end]),
                start=self.computed,
                prompt_length=self.num_prompt,
                logits_from=end - (end == self.num_prompt),
            )
        return DecodeRow(row=row, token=self.tokens[-1], position=self.computed)

    def advance(self, entry: PromptChunk | DecodeRow, token: int | None) -> None:
        self.computed += len(entry.tokens) if isinstance(entry, PromptChunk) else 1
        if token is not None:
            self.tokens.append(token)


def run_step(runner: Runner, requests: dict[int, Request], chunk: int) -> None:
    """One step of all of them; the likeliest token is drawn."""
    entries = {row: request.entry(row, chunk) for row, request in requests.items()}
    chunks = [entry for entry in entries.values() if isinstance(entry, PromptChunk)]
    decodes = [entry for entry in entries.values() if isinstance(entry, DecodeRow)]
    plan = StepPlan(chunks=tuple(chunks), decodes=tuple(decodes))
    tokens = iter(runner.run(plan).tokens_N.tolist())
    for entry in (*chunks, *decodes):
        request = requests[entry.row]
        is_drawn = isinstance(entry, DecodeRow) or entry.end == request.num_prompt
        request.advance(entry, next(tokens) if is_drawn else None)


def add(runner: Runner, request: Request) -> int:
    return runner.kv.add(request.num_prompt + OUTPUT, method=request.method, token_budget=None)


def undisturbed(runner: Runner, name: int, num_prompt: int, method: SparseMethod) -> list[int]:
    request = Request(name, num_prompt=num_prompt, method=method)
    row = add(runner, request)
    while not request.is_done:
        run_step(runner, {row: request}, 4096)
    runner.kv.free(row)
    return request.tokens


class SpillMachine(RuleBasedStateMachine):
    """Requests come, run beside each other, are spilled and restored at any point, come back whole
    a block a step where there is room, and go."""

    def __init__(self, make_runner: MakeRunner) -> None:
        super().__init__()
        self.make_runner = make_runner
        self.expected: dict[tuple[int, int, SparseMethod], list[int]] = {}

    @initialize(page_size=st.sampled_from((8, 32)), lane_blocks=st.sampled_from((5, 8, 11)))
    def start(self, page_size: int, lane_blocks: int) -> None:
        values = {
            "page_size": page_size,
            "token_budget": 256,
            "max_model_len": 1024,
            "sparse_method": "quest",
        }
        self.alone = self.make_runner("dummy:tiny", lane_blocks=40, **values)
        self.runner = self.make_runner("dummy:tiny", lane_blocks=lane_blocks, **values)
        self.runner.kv._regrowth._slice_blocks = 1
        self.requests: dict[int, Request] = {}
        self.names: dict[int, int] = {}

    @rule(
        name=st.integers(0, 5),
        num_prompt=st.sampled_from((5, 100, 250, 400, 600)),
        method=st.sampled_from(METHODS),
    )
    def add(self, name: int, num_prompt: int, method: SparseMethod) -> None:
        request = Request(name, num_prompt=num_prompt, method=method)
        if self.runner.kv.can_admit(num_prompt + OUTPUT, method=method, token_budget=None):
            row = add(self.runner, request)
            self.requests[row], self.names[row] = request, name

    @precondition(lambda self: self.requests)
    @rule(num_steps=st.integers(1, 30), chunk=st.sampled_from((37, 128, 4096)))
    def run(self, num_steps: int, chunk: int) -> None:
        rows = self.runner.kv.rows
        for _ in range(num_steps):
            active = {
                row: request
                for row, request in self.requests.items()
                if not (rows[row].is_spilled or request.is_done)
            }
            if active:
                self.runner.kv.observe()
                run_step(self.runner, active, chunk)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def spill_or_restore(self, data: st.DataObject) -> None:
        row, kv = data.draw(st.sampled_from(sorted(self.requests))), self.runner.kv
        computed = self.requests[row].computed
        if not kv.rows[row].is_spilled:
            kv.spill(row, computed)
        elif kv.can_restore(row):
            kv.restore(row, computed)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.requests)))
        request, name = self.requests.pop(row), self.names.pop(row)
        self.runner.kv.free(row)
        self.check(request, name)

    def teardown(self) -> None:
        for row, request in getattr(self, "requests", {}).items():
            self.check(request, self.names[row])

    def check(self, request: Request, name: int) -> None:
        key = (name, request.num_prompt, request.method)
        if key not in self.expected:
            self.expected[key] = undisturbed(self.alone, *key)
        assert self.expected[key][: len(request.tokens)] == request.tokens

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "runner"):
            self.runner.kv.check_integrity()


@pytest.mark.slow
def test_tokens_are_those_of_an_undisturbed_run(make_runner: MakeRunner) -> None:
    run_state_machine_as_test(
        lambda: SpillMachine(make_runner),
        settings=settings(max_examples=12, stateful_step_count=15),
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_spilled_request_holds_frames_and_no_blocks(
    make_runner: MakeRunner, method: SparseMethod
) -> None:
    runner = make_runner(
        "dummy:tiny", lane_blocks=8, token_budget=256, max_model_len=1024, sparse_method="quest",
        page_size=32,
    )  # fmt: skip
    kv = runner.kv
    expected = undisturbed(runner, 1, 600, method)
    request = Request(1, num_prompt=600, method=method)
    row = add(runner, request)
    for _ in range(20):
        run_step(runner, {row: request}, 4096)
    kv.spill(row, request.computed)
    assert len(kv.arena.blocks) == kv.arena.blocks.size
    assert len(kv.pool.frames) == kv.pool.frames.size - 6
    kv.arena.pages_NX.fill_(float("nan"))  # what others do to the slots meanwhile
    loaded = kv.transfer.h2d[0]
    kv.restore(row, request.computed)
    num_pages = -(-request.computed // 32) if method is SparseMethod.DENSE else 1
    num_bytes = num_pages * kv.geometry.num_lanes * kv.geometry.page_bytes
    assert kv.transfer.h2d[0] - loaded == num_bytes, "mandatory pages, and no others"
    while not request.is_done:
        run_step(runner, {row: request}, 4096)
    assert request.tokens == expected
    kv.free(row)
    kv.check_integrity()


class AheadRunner(Runner):
    """Runs ahead on a CPU too: a request may be spilled while a token of it is in flight."""

    @property
    def runs_ahead(self) -> bool:
        return True


def texts(engine: Engine) -> dict[str, list[int]]:
    """Six requests that are there from the start, by name."""
    for name, num_prompt in enumerate((40, 300, 500, 700, 129, 256)):
        prompt = Request(name, num_prompt=num_prompt, method=SparseMethod.QUEST).tokens
        sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.8, seed=name)
        engine.add(AddRequest(request_id=str(name), prompt_tokens=tuple(prompt), sampling=sampling))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            if output.token_id is not None:
                found.setdefault(output.request_id, []).append(output.token_id)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Runner, AheadRunner])
@pytest.mark.parametrize("seed", range(2))
def test_whoever_is_spilled_tells_the_same_text(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, kind: type[Runner], seed: int
) -> None:
    """Spilled at any time, in the middle of prompts too, and brought back at any later one."""
    draw = random.Random(seed)

    def anybody(running: Sequence[Held], *_: Any, **__: Any) -> int | None:
        return draw.randrange(len(running)) if draw.random() < 0.5 else None

    values = {"page_size": 8, "token_budget": 256, "sparse_method": "quest", "prefill_chunk": 100}

    def engine() -> Engine:
        spec = make_spec("dummy:tiny", lane_blocks=14, max_model_len=1024, **values)
        runner = kind(
            replace(spec, enforce_eager=True, verify_kv=VerifyMode.FULL),
            on_progress=lambda *_: None,
        )
        return Engine(runner, knobs=spec.knobs, service=Service(recall_floor=0.0))

    expected = texts(engine())
    assert all(len(text) == OUTPUT for text in expected.values())
    monkeypatch.setattr(scheduler, "LOOK_EVERY_STEPS", 1)
    monkeypatch.setattr(scheduler, "victim", anybody)
    monkeypatch.setattr(
        scheduler,
        "why_not_back",
        lambda running, *_, **__: (
            scheduler.WaitReason.SPILLED if running and draw.random() < 0.7 else None
        ),
    )
    disturbed = engine()
    assert texts(disturbed) == expected
    stats = disturbed.stats()
    assert stats.verify_checked_pages > 0 == stats.verify_mismatches
    assert stats.spills == stats.restores > 10
    kv = disturbed._model.kv
    assert isinstance(kv, KVCache) and kv.rows == {}
    kv.check_integrity()
