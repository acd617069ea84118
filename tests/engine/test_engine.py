"""The step loop over a scripted model: same tokens in any company, after any interruption."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsed.core import (
    AddRequest,
    CapacityError,
    EngineStats,
    FinishReason,
    InputError,
    Knobs,
    RefusalReason,
    SamplingParams,
    SparseDetails,
    SparseMethod,
    SparseOptions,
    TokenOutput,
    WaitReason,
)
from sparsed.engine.admission import Claim, Room
from sparsed.engine.batch import DrawParams, StepPlan
from sparsed.engine.draws import draw
from sparsed.engine.engine import Engine
from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.pace import Pace
from sparsed.engine.preemption import SETTLE_STEPS
from sparsed.engine.recorder import Drawn

VOCAB = 50
KNOBS = Knobs(
    token_budget=256,
    hbm_budget=None,
    max_num_active_seqs=4,
    prefill_chunk=16,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=8,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=1024,
)


class ScriptedClaims:
    """Everything costs a page a token, and the hot tier is as large as ``hot_tokens``."""

    miss_s = 0.0

    def __init__(self, cache: ScriptedCache) -> None:
        self._cache = cache

    def of_row(self, row: int) -> Claim:
        return _claim(self._cache.reserved[row])

    def of_request(self, num_tokens: int, **_values: object) -> Claim:
        return _claim(num_tokens)

    def room(self, pace: Pace) -> Room:
        free_rows = 8 - len(self._cache.rows)
        return Room(hot_pages=self._cache.hot_tokens, free_frames=9999, free_rows=free_rows)


def _claim(num_tokens: int) -> Claim:
    curve = MissCurve(slots=1, misses=0, exponent=1, selected=1, total=num_tokens)
    return Claim(mandatory_pages=num_tokens, working_set_pages=num_tokens, frames=1, curve=curve)


class ScriptedCache:
    """Rows that keep the tokens written to them."""

    def __init__(self, capacity: int = 600, max_budget: int = 8192) -> None:
        self.capacity = capacity
        self.max_budget = max_budget
        self.rows: dict[int, list[int]] = {}
        self.reserved: dict[int, int] = {}
        self.hot_tokens = 10**6
        self.spilled: dict[int, int] = {}
        self.recall_lists: dict[int, list[float]] = {}
        self.attention: list[tuple[int, int, bool]] = []
        self.num_spills = 0
        self.claims = ScriptedClaims(self)

    def spill(self, row: int, num_tokens: int) -> None:
        assert len(self.rows[row]) == num_tokens, "all that was computed, and no more"
        self.spilled[row] = num_tokens
        self.num_spills += 1

    def can_restore(self, row: int) -> bool:
        return True

    def restore(self, row: int, num_tokens: int) -> None:
        assert self.spilled.pop(row) == num_tokens

    def observe(self) -> None:
        pass

    def rebudget(self) -> None:
        pass

    def recalls(self, row: int) -> list[float]:
        return self.recall_lists.get(row, [])

    def set_attention(self, row: int, *, token_budget: int, is_dense: bool) -> None:
        self.attention.append((row, token_budget, is_dense))

    def can_admit(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> bool:
        used = sum(self.reserved.values())
        return used + num_tokens <= self.capacity and (token_budget or 0) <= self.max_budget

    def check_fits(self, num_tokens: int) -> None:
        if num_tokens > self.capacity:
            raise CapacityError(f"{num_tokens} tokens never fit", field="max_tokens")

    def add(self, num_tokens: int, *, method: SparseMethod, token_budget: int | None) -> int:
        row = max(self.rows, default=-1) + 1
        self.rows[row] = []
        self.reserved[row] = num_tokens
        return row

    def free(self, row: int) -> None:
        assert len(self.rows.pop(row)) <= self.reserved.pop(row)
        self.spilled.pop(row, None)
        self.recall_lists.pop(row, None)

    def details(self, row: int, *, num_dropped: int) -> SparseDetails:
        return SparseDetails(
            method="scripted",
            token_budget=256,
            decode_steps=len(self.rows[row]) - num_dropped,
            sparse_steps=0,
            tokens_read=0,
            tokens_dense=0,
            coverage=None,
        )


class ScriptedModel:
    """Logits that depend on every token before them: a scheduling error changes the text."""

    vocab_size = VOCAB

    def __init__(self, cache: ScriptedCache | None = None, *, runs_ahead: bool = False) -> None:
        self.kv = cache or ScriptedCache()
        self.plans: list[StepPlan] = []
        self.runs_ahead = runs_ahead
        self._last: dict[int, int] = {}  # token drawn for a row

    def run(self, plan: StepPlan) -> Drawn:
        self.plans.append(plan)
        logits: list[Tensor] = []
        draws: list[tuple[int, DrawParams | None]] = []
        for chunk in plan.chunks:
            for position, token in enumerate(chunk.tokens, chunk.start):
                row = self._write(chunk.row, token, position)
                if position >= chunk.logits_from:
                    logits.append(row)
                    last = position == chunk.prompt_length - 1
                    draws.append((chunk.row, chunk.draw if last else None))
        for entry in plan.decodes:
            assert entry.token is not None or self.runs_ahead
            token = self._last[entry.row] if entry.token is None else entry.token
            logits.append(self._write(entry.row, token, entry.position))
            draws.append((entry.row, entry.draw))
        logits_NV = torch.stack(logits) if logits else torch.zeros(0, VOCAB)
        return Drawn(logits_NV, self._draw(logits_NV, draws))

    def _draw(self, logits_NV: Tensor, draws: list[tuple[int, DrawParams | None]]) -> Tensor:
        if not self.runs_ahead:
            return logits_NV.argmax(-1)
        tokens_N = draw(logits_NV, draws=[asked for _, asked in draws])
        self._last.update(zip((row for row, _ in draws), tokens_N.tolist(), strict=True))
        return tokens_N

    def stats(self) -> EngineStats:
        return EngineStats(hot_hits=11)

    readiness = 1.0
    is_preparing = False

    def ask(self, knobs: Knobs) -> None:
        pass

    def prepare(self, *, idle: bool) -> None:
        pass

    def apply(self, knobs: Knobs) -> None:
        pass

    def _write(self, row: int, token: int, position: int) -> Tensor:
        tokens = self.kv.rows[row]
        assert row not in self.kv.spilled
        assert position == len(tokens), "tokens come in order, each once"
        tokens.append(token)
        return next_logits(tokens)


def next_logits(tokens: Sequence[int]) -> Tensor:
    numbers = np.random.default_rng(list(tokens)).normal(scale=2.0, size=VOCAB)
    return torch.tensor(numbers, dtype=torch.float32)


def request(name: str, *, prompt: Sequence[int], generated: Sequence[int] = (),
            budget: int | None = None, **params: Any) -> AddRequest:  # fmt: skip
    return AddRequest(
        request_id=name,
        prompt_tokens=tuple(prompt),
        sampling=SamplingParams(**{"max_tokens": 8, **params}),
        sparse=SparseOptions(token_budget=budget),
        generated_tokens=tuple(generated),
    )


def engine(cache: ScriptedCache | None = None, *, runs_ahead: bool = False, **knobs: Any) -> Engine:
    return Engine(ScriptedModel(cache, runs_ahead=runs_ahead), knobs=replace(KNOBS, **knobs))


def outputs(engine: Engine) -> list[TokenOutput]:
    """All that is left to come."""
    result: list[TokenOutput] = []
    while engine.has_work:
        result.extend(engine.step().outputs)
    return result


def texts(found: Sequence[TokenOutput]) -> dict[str, list[int]]:
    result: dict[str, list[int]] = {}
    for output in found:
        tokens = result.setdefault(output.request_id, [])
        if output.token_id is not None:
            tokens.append(output.token_id)
    return result


def alone(added: AddRequest) -> list[int]:
    only = engine()
    only.add(added)
    return texts(outputs(only))[added.request_id]


def test_greedy_text_is_that_of_the_model() -> None:
    expected = list(range(20))
    for _ in range(5):
        expected.append(int(next_logits(expected).argmax()))
    assert alone(request("a", prompt=range(20), temperature=0.0, max_tokens=5)) == expected[20:]


def test_outputs_count_up_and_the_last_one_closes() -> None:
    one = engine()
    one.add(request("a", prompt=[1, 2, 3], max_tokens=3))
    found = outputs(one)
    assert [output.index for output in found] == [0, 1, 2]
    assert [output.finish_reason for output in found] == [None, None, FinishReason.LENGTH]
    assert [output.sparse is None for output in found] == [True, True, False]
    assert found[-1].sparse is not None
    assert found[-1].sparse.decode_steps == 5, "the last token is never computed"


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_stop_token_is_reported_and_ends(runs_ahead: bool) -> None:
    text = alone(request("a", prompt=[4, 5], temperature=0.0))
    stop = text[3]
    stopped = engine(runs_ahead=runs_ahead)
    stopped.add(request("a", prompt=[4, 5], temperature=0.0, stop_token_ids=(stop,)))
    found = outputs(stopped)
    assert texts(found)["a"] == text[: text.index(stop) + 1]
    assert found[-1].sparse is not None
    assert found[-1].sparse.decode_steps == 2 + text.index(stop), "a dropped step does not count"
    assert found[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9, "top_k": 7}])
def test_a_step_that_runs_ahead_is_read_one_step_late(params: dict[str, Any]) -> None:
    ahead = engine(runs_ahead=True)
    added = request("a", prompt=[4, 5], max_tokens=3, **params)
    ahead.add(added)
    assert ahead.step().outputs == (), "the first token is in flight"
    second = request("b", prompt=[6], temperature=0.0, max_tokens=2)
    ahead.add(second)
    assert [output.request_id for output in ahead.step().outputs] == ["a"]
    found = {"a": alone(added)[:1]}
    for name, tokens in texts(outputs(ahead)).items():
        found.setdefault(name, []).extend(tokens)
    assert found == {"a": alone(added), "b": alone(second)}


def test_what_is_in_flight_of_an_aborted_request_is_dropped() -> None:
    ahead = engine(runs_ahead=True)
    ahead.add(request("a", prompt=[4, 5], temperature=0.0))
    ahead.add(request("b", prompt=[7], temperature=0.0))
    ahead.step()
    ahead.abort("a")
    ahead.add(request("a", prompt=[4, 5], temperature=0.0, max_tokens=2))
    found = outputs(ahead)
    closing = next(output for output in found if output.request_id == "a")
    assert (closing.token_id, closing.finish_reason) == (None, FinishReason.ABORT)
    assert texts(found) == {
        "a": alone(request("a", prompt=[4, 5], temperature=0.0))[:2],
        "b": alone(request("b", prompt=[7], temperature=0.0)),
    }


@pytest.mark.parametrize("params", [{"presence_penalty": 1.0}, {"logprobs": 1},
                                    {"logit_bias": ((3, 4.0),)}])  # fmt: skip
def test_what_the_model_cannot_draw_is_drawn_at_once(params: dict[str, Any]) -> None:
    model = ScriptedModel(runs_ahead=True)
    ahead = Engine(model, knobs=KNOBS)
    ahead.add(request("a", prompt=[4, 5], **params))
    for index in range(3):
        (output,) = ahead.step().outputs
        assert output.index == index
    plain = engine(runs_ahead=True)
    plain.add(request("a", prompt=[4, 5]))
    assert plain.step().outputs == ()
    asked = [entry.draw for plan in model.plans for entry in (*plan.chunks, *plan.decodes)]
    assert asked == [None] * 3


def test_a_model_that_does_not_run_ahead_draws_only_the_most_likely() -> None:
    drawn = engine()
    drawn.add(request("a", prompt=[4, 5], top_k=3))
    (output,) = drawn.step().outputs
    assert output.token_id == alone(request("a", prompt=[4, 5], top_k=3))[0]


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(max_examples=25)
@given(
    prompts=sizes,
    chunk=st.integers(16, 70),
    active=st.integers(1, 6),
    runs_ahead=st.booleans(),
    data=st.data(),
)
def test_company_chunks_and_replay_change_no_text(
    prompts: list[int], chunk: int, active: int, runs_ahead: bool, data: st.DataObject
) -> None:
    added = [
        request(str(i), prompt=range(i, i + n) if n < 40 else [i] * n, seed=i, max_tokens=6,
                temperature=i % 2, frequency_penalty=float(i % 4 // 2), top_p=1 - i % 3 / 10)
        for i, n in enumerate(prompts)
    ]  # fmt: skip
    expected = {one.request_id: alone(one) for one in added}
    first = engine(prefill_chunk=chunk, max_num_active_seqs=active, runs_ahead=runs_ahead)
    for one in added:
        first.add(one)
    before: list[TokenOutput] = []
    for _ in range(data.draw(st.integers(0, 12))):
        before.extend(first.step().outputs)
    second = engine(prefill_chunk=chunk, max_num_active_seqs=active, runs_ahead=runs_ahead)
    finished = {output.request_id for output in before if output.finish_reason}
    for one in added:
        if one.request_id not in finished:
            known = texts(before).get(one.request_id, [])
            second.add(replace(one, generated_tokens=tuple(known)))
    after = outputs(second)
    assert texts(before + after) == expected
    for one in added:
        indices = [o.index for o in before + after if o.request_id == one.request_id]
        assert indices == list(range(6)), "nothing is reported twice"


def test_a_replay_feeds_known_tokens_through_decode() -> None:
    model = ScriptedModel()
    replayed = Engine(model, knobs=KNOBS)
    known = alone(request("a", prompt=range(20), temperature=0.0))[:5]
    replayed.add(request("a", prompt=range(20), temperature=0.0, generated=known))
    outputs(replayed)
    prefilled = [token for plan in model.plans for chunk in plan.chunks for token in chunk.tokens]
    decoded = [entry.token for plan in model.plans for entry in plan.decodes]
    assert prefilled == list(range(20))
    assert decoded[:5] == known


def test_a_replay_does_not_score_its_prompt_again() -> None:
    model = ScriptedModel()
    replayed = Engine(model, knobs=KNOBS)
    replayed.add(request("a", prompt=range(10), generated=[1], prompt_logprobs=0))
    replayed.step()
    assert model.plans[0].chunks[0].logits_from == 9


def test_a_name_can_be_used_again_with_nothing_left_behind() -> None:
    used = engine()
    again = request("a", prompt=[1, 2], temperature=0.0, frequency_penalty=2.0)
    found = []
    for _ in range(2):
        used.add(again)
        found.append(texts(outputs(used)))
    assert found[0] == found[1]


def test_a_replay_of_all_tokens_only_closes() -> None:
    done = engine()
    done.add(request("a", prompt=[1], generated=[3, 4], max_tokens=2))
    (closing,) = outputs(done)
    assert (closing.index, closing.token_id) == (2, None)
    assert closing.finish_reason is FinishReason.LENGTH


def test_a_replay_cut_short_closes_after_what_was_reported() -> None:
    cut = engine()
    cut.add(request("a", prompt=[1], generated=[3, 4, 5]))
    cut.step()
    cut.abort("a")
    (closing,) = outputs(cut)
    assert closing.index == 3


def test_prompt_logprobs_describe_each_token_given_those_before() -> None:
    prompt = list(range(40))
    scored = engine()
    scored.add(request("a", prompt=prompt, max_tokens=2, prompt_logprobs=1, logprobs=0))
    first, second = outputs(scored)
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == 40
    for place, entries in enumerate(first.prompt_logprobs[1:], 1):
        expected = torch.log_softmax(next_logits(prompt[:place]), dim=0)
        assert entries is not None
        assert entries[0].token_id == prompt[place]
        assert entries[0].logprob == pytest.approx(float(expected[prompt[place]]), rel=1e-5)
        assert entries[1].token_id == int(expected.argmax())
    assert second.prompt_logprobs is None
    assert second.logprob is not None
    assert second.top_logprobs == ()


def test_no_tokens_wanted_gives_the_prompt_logprobs() -> None:
    scored = engine()
    scored.add(request("a", prompt=[1, 2, 3], max_tokens=0, prompt_logprobs=0))
    (only,) = outputs(scored)
    assert (only.token_id, only.finish_reason) == (None, FinishReason.LENGTH)
    assert only.prompt_logprobs is not None
    assert len(only.prompt_logprobs) == 3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request("bad", prompt=[]), "empty"),
        (request("bad", prompt=[1, VOCAB]), "outside the vocabulary"),
        (request("bad", prompt=[1], logit_bias=((-1, 1.0),)), "logit_bias"),
        (request("bad", prompt=[1] * 600), "never fit"),
        (request("bad", prompt=[1], budget=100_000), "token_budget"),
        (request("bad", prompt=[1], budget=8000), "lower sparse.token_budget"),
    ],
)
def test_a_request_that_cannot_be_served_harms_nobody(bad: AddRequest, words: str) -> None:
    shared = engine(ScriptedCache(max_budget=4096))
    good = request("good", prompt=[3, 4], seed=1)
    shared.add(good)
    shared.add(bad)
    found = outputs(shared)
    assert texts(found)["good"] == alone(good)
    (refusal,) = [output for output in found if output.request_id == "bad"]
    assert refusal.finish_reason is FinishReason.ERROR
    assert refusal.token_id is None
    assert words in str(refusal.error)


def test_abort_frees_the_row_and_closes_once() -> None:
    cache = ScriptedCache()
    busy = engine(cache, max_num_active_seqs=1)
    for name in ("running", "waiting"):
        busy.add(request(name, prompt=[1, 2]))
    (token,) = busy.step().outputs
    for name in ("running", "waiting", "running", "never"):
        busy.abort(name)
    assert cache.rows == {}
    assert busy.has_work, "the closing outputs are still to be reported"
    closing = outputs(busy)
    assert [(o.request_id, o.index, o.token_id) for o in closing] == [
        ("running", 1, None),
        ("waiting", 0, None),
    ]
    assert {output.finish_reason for output in closing} == {FinishReason.ABORT}
    assert closing[0].sparse is not None
    assert closing[1].sparse is None
    assert token.request_id == "running"


def test_an_unseeded_request_is_drawn_alike_by_a_restarted_engine() -> None:
    assert alone(request("a", prompt=[1])) == alone(request("a", prompt=[1]))
    assert alone(request("a", prompt=[1])) != alone(request("b", prompt=[1]))


def test_stats_count_what_was_done() -> None:
    counted = engine(max_num_active_seqs=1)
    for name in ("a", "b"):
        counted.add(request(name, prompt=range(20), max_tokens=2))
    counted.step()
    middle = counted.stats()
    assert (middle.num_running, middle.num_waiting, middle.steps) == (1, 1, 1)
    assert (middle.prompt_tokens, middle.generated_tokens) == (16, 0)
    outputs(counted)
    final = counted.stats()
    assert (final.prompt_tokens, final.generated_tokens, final.requests_finished) == (40, 4, 2)
    assert (final.num_running, final.num_waiting, final.hot_hits) == (0, 0, 11)
    assert len(final.recent_step_s) == final.steps - 1
    assert sum(final.recent_step_s) < final.step_s
    assert counted.stats().recent_step_s == ()


def test_hot_knobs_change_live_and_others_are_refused() -> None:
    live = engine()
    live.apply(replace(KNOBS, prefill_chunk=64, max_num_active_seqs=1))
    assert (
        live.stats().knobs == live.knobs == replace(KNOBS, prefill_chunk=64, max_num_active_seqs=1)
    )
    with pytest.raises(InputError, match="page_size changes only with a restart"):
        live.apply(replace(live.knobs, page_size=16))
    assert live.knobs.page_size == 32


def test_the_shell_around_the_model_is_thin() -> None:
    """At batch 1 a step costs well under the 30 ms of processor time that a small model takes."""
    logits = torch.randn(1, 49_152)
    model = ScriptedModel()
    model.vocab_size = 49_152
    drawn = Drawn(logits, logits.argmax(-1))
    model.run = lambda plan: drawn  # type: ignore[method-assign]  # free of charge
    thin = Engine(model, knobs=KNOBS)
    thin.add(request("a", prompt=[1], temperature=0.0, max_tokens=500))
    thin.step()
    times = []
    while thin.has_work:
        started = time.thread_time()
        thin.step()
        times.append(time.thread_time() - started)
    assert sorted(times)[len(times) // 2] < 0.5e-3


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_spilled_requests_tell_the_same_text(runs_ahead: bool) -> None:
    """The hot tier shrinks to one request, grows again, and nobody notices but by the clock."""
    cache = ScriptedCache(capacity=2000)
    shared = engine(cache, runs_ahead=runs_ahead)
    added = [request(n, prompt=range(9), max_tokens=300, seed=3) for n in ("a", "b", "c")]
    for one in added:
        shared.add(one)
    found: list[TokenOutput] = []
    for hot_tokens in (10**6, 400, 10**6):
        cache.hot_tokens = hot_tokens
        for _ in range(SETTLE_STEPS + 10):
            found.extend(shared.step().outputs)
        assert len(cache.spilled) == (2 if hot_tokens == 400 else 0)
        stats = shared.stats()
        assert stats.num_spilled == len(cache.spilled)
        told = {one.request_id: one.reason for one in stats.waiting}
        assert set(told) == ({"b", "c"} if hot_tokens == 400 else set())
    found += outputs(shared)
    assert (stats.spills, stats.restores) == (2, 2)
    solo = engine(runs_ahead=runs_ahead)
    for one in added:
        solo.add(one)
        assert texts(found)[one.request_id] == texts(outputs(solo))[one.request_id]
    assert cache.rows == {} == cache.spilled


def test_a_spilled_request_can_be_aborted() -> None:
    cache = ScriptedCache(capacity=2000)
    shared = engine(cache)
    for name in ("a", "b"):
        shared.add(request(name, prompt=[1], max_tokens=400))
    for _ in range(SETTLE_STEPS + 8):
        shared.step()
    cache.hot_tokens = 500
    for _ in range(8):
        shared.step()
    assert len(cache.spilled) == 1
    shared.abort("b")
    assert cache.spilled == {} and len(cache.rows) == 1
    shared.abort("a")
    assert {o.finish_reason for o in outputs(shared)} == {FinishReason.ABORT}


def test_low_recall_raises_the_budget_in_the_next_step() -> None:
    cache = ScriptedCache()
    watched = engine(cache)
    watched.add(request("a", prompt=[1], max_tokens=500))
    watched.step()
    (row,) = cache.rows
    samples = cache.recall_lists.setdefault(row, [])
    for recall, expected in (
        (0.9, []),
        (0.2, [(row, 512, False)]),
        (0.3, [(row, 1024, False)]),
    ):
        cache.attention.clear()
        samples.append(recall)
        watched.step()
        assert cache.attention == expected
    stats = watched.stats()
    assert (stats.quality_raises, stats.quality_dense) == (2, 0)
    assert [(e.request_id, e.recall, e.token_budget) for e in stats.recent_quality] == [
        ("a", 0.2, 512),
        ("a", 0.3, 1024),
    ]
    cache.attention.clear()
    watched.apply(replace(KNOBS, token_budget=512))
    assert cache.attention == [(row, 2048, False)], "a multiple of the new budget"
    samples.extend([0.1, 0.1])
    watched.step()
    assert cache.attention[-1] == (row, 4096, True)
    assert watched.stats().quality_dense == 1
    assert watched.stats().recent_quality == ()


def test_requests_pass_the_gates_that_an_engine_is_given() -> None:
    """All would fit, and each waits for the one before."""

    def one_by_one(running: Sequence[Claim], _candidate: Claim, _room: Room) -> WaitReason | None:
        return WaitReason.LINK if running else None

    shy = Engine(ScriptedModel(), knobs=KNOBS, gates=[one_by_one])
    for name in "abc":
        shy.add(request(name, prompt=[1, 2, 3]))
    most = 0
    while shy.has_work:
        shy.step()
        most = max(most, shy.stats().num_running)
    assert most == 1
    assert {one.reason for one in shy.stats().waits} == {WaitReason.LINK}


def test_refusals_are_counted_by_reason() -> None:
    refusing = engine(ScriptedCache(max_budget=4096))
    for bad in (
        request("a", prompt=[]),
        request("b", prompt=[1] * 700),
        request("c", prompt=[1], budget=8000),
    ):
        refusing.add(bad)
    outputs(refusing)
    counts = {one.reason: one.count for one in refusing.stats().refusals}
    assert counts == {
        RefusalReason.INVALID: 1,
        RefusalReason.DRAM_TIER: 1,
        RefusalReason.HOT_TIER: 1,
    }
