"""The ledger: nothing lost, nothing doubled, whatever the engine does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparsed.controller import request_stream
from sparsed.controller.ledger import Ledger, LedgerLimits, Unavailable
from sparsed.controller.request_stream import LAST_OUTPUT_S, RequestStream
from sparsed.controller.service_rate import LONGEST_S, UNKNOWN_S
from sparsed.controller.suspicion import ACQUITTAL_TOKENS
from sparsed.core import (
    AbortRequest,
    AddRequest,
    CapacityError,
    FinishReason,
    InputError,
    RefusalReason,
    SamplingParams,
    TokenBatch,
    TokenOutput,
)

NUM_ACTIVE = 2


@dataclass
class Bench:
    """A ledger with its clock, its outgoing messages and the figures it reported."""

    num_active: int = NUM_ACTIVE
    now_s: float = 0.0
    sent: list[AddRequest | AbortRequest] = field(default_factory=list)
    observed: list[tuple[float, float | None]] = field(default_factory=list)
    refused: list[RefusalReason] = field(default_factory=list)

    def __post_init__(self) -> None:
        seeds = iter(range(100, 1_000_000))
        self.ledger = Ledger(
            LedgerLimits(max_tokens=64, max_waiting=3, num_active=lambda: self.num_active),
            send=self.sent.append,
            observe=lambda *, ttft_s, tpot_s: self.observed.append((ttft_s, tpot_s)),
            refuse=self.refused.append,
            clock=lambda: self.now_s,
            draw_seed=lambda: next(seeds),
        )

    def submit(self, name: str, *, max_tokens: int = 4, prompt: int = 3) -> RequestStream:
        return self.ledger.submit(
            AddRequest(
                request_id=name,
                prompt_tokens=tuple(range(prompt)),
                sampling=SamplingParams(max_tokens=max_tokens),
            )
        )

    def token(self, name: str, index: int, *, last: bool = False) -> None:
        self.ledger.on_batch(
            TokenBatch(
                outputs=(
                    TokenOutput(
                        request_id=name,
                        index=index,
                        token_id=1000 + index,
                        finish_reason=FinishReason.LENGTH if last else None,
                    ),
                )
            )
        )


def read(stream: RequestStream) -> list[TokenOutput]:
    """All outputs of a stream that has ended."""

    async def collect() -> list[TokenOutput]:
        async with asyncio.timeout(1.0):
            return [output async for output in stream]

    return asyncio.run(collect())


def sent_ids(bench: Bench) -> list[str]:
    return [message.request_id for message in bench.sent]


def tokens_of(stream: RequestStream) -> list[int | None]:
    return [output.token_id for output in read(stream)]


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.ledger.on_engine_ready()
    return bench


def test_tokens_reach_their_stream_in_order(bench: Bench) -> None:
    one, two = bench.submit("one"), bench.submit("two")
    for index in range(4):
        bench.token("one", index, last=index == 3)
        bench.token("two", index, last=index == 3)
    assert tokens_of(one) == tokens_of(two) == [1000, 1001, 1002, 1003]
    assert bench.ledger.num_unfinished == 0


def test_requests_before_the_engine_is_up_wait_for_it() -> None:
    bench = Bench()
    bench.submit("one")
    bench.submit("two")
    assert bench.sent == []
    bench.ledger.on_engine_ready()
    assert [message.request_id for message in bench.sent] == ["one", "two"]


def test_latencies_come_from_the_injected_clock(bench: Bench) -> None:
    bench.submit("one", max_tokens=3)
    for now_s, index in ((2.0, 0), (3.0, 1), (7.0, 2)):
        bench.now_s = now_s
        bench.token("one", index, last=index == 2)
    bench.submit("two", max_tokens=1)
    bench.now_s = 7.5
    bench.token("two", 0, last=True)
    assert bench.observed == [(2.0, 2.5), (0.5, None)]


def test_a_replay_carries_the_tokens_and_the_same_seed(bench: Bench) -> None:
    stream = bench.submit("one")
    bench.token("one", 0)
    bench.token("one", 1)
    bench.ledger.on_engine_lost()
    bench.ledger.on_engine_ready()
    first, replay = bench.sent
    assert isinstance(first, AddRequest) and isinstance(replay, AddRequest)
    assert replay.generated_tokens == (1000, 1001)
    assert replay.sampling.seed == first.sampling.seed is not None
    for index in (1, 2, 3):  # 1 was delivered before the death
        bench.token("one", index, last=index == 3)
    assert tokens_of(stream) == [1000, 1001, 1002, 1003]


def lose_engine(bench: Bench) -> list[str]:
    """One death and one restart; who is sent to the new engine, in order."""
    bench.ledger.on_engine_lost()
    bench.sent.clear()
    bench.ledger.on_engine_ready()
    return sent_ids(bench)


def test_a_request_that_runs_alone_may_kill_once(bench: Bench) -> None:
    stream = bench.submit("one")
    assert lose_engine(bench) == ["one"]
    assert lose_engine(bench) == []
    (last,) = read(stream)
    assert last.finish_reason is FinishReason.ERROR
    assert "died 2 times" in str(last.error)
    assert bench.ledger.num_failed == 1


def test_only_running_requests_are_suspected_and_only_one_of_them_runs(bench: Bench) -> None:
    for name in ("one", "two", "three"):
        bench.submit(name)
    assert lose_engine(bench) == ["one", "two", "three"]
    assert lose_engine(bench) == ["one", "three"]  # "three" never ran: two at a time
    bench.token("one", 0, last=True)
    assert sent_ids(bench) == ["one", "three", "two"]
    assert bench.ledger.num_failed == 0


def test_a_suspect_is_convicted_only_alone(bench: Bench) -> None:
    streams = [bench.submit(name) for name in ("one", "two", "three")]
    lose_engine(bench)
    lose_engine(bench)
    assert lose_engine(bench) == ["one"]  # it ran beside "three": either may have killed
    bench.submit("four")
    assert sent_ids(bench) == ["one"]
    assert lose_engine(bench) == ["two", "three"]
    assert read(streams[0])[-1].finish_reason is FinishReason.ERROR
    assert bench.ledger.num_failed == 1


def test_a_conviction_says_how_many_deaths_it_explains(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.submit(name)
    explained = []
    for _ in range(4):  # two with both, which makes them suspects; then each alone
        explained.append(bench.ledger.on_engine_lost())
        bench.ledger.on_engine_ready()
    assert explained == [0, 0, 3, 3]


def test_enough_tokens_end_a_suspicion(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.submit(name, max_tokens=40)
    lose_engine(bench)
    assert lose_engine(bench) == ["one"]
    for index in range(ACQUITTAL_TOKENS):
        assert len(bench.sent) == 1
        bench.token("one", index)
    assert sent_ids(bench) == ["one", "two"]


def test_a_death_while_loading_is_nobodys_fault(bench: Bench) -> None:
    bench.submit("one")
    for _ in range(5):
        bench.ledger.on_engine_lost()
    assert bench.ledger.num_unfinished == 1


def test_cancel_ends_the_stream_and_tells_the_engine(bench: Bench) -> None:
    stream = bench.submit("one")
    bench.token("one", 0)
    stream.cancel()
    bench.token("one", 1)
    stream.cancel()
    assert tokens_of(stream) == [1000]
    assert bench.sent[1:] == [AbortRequest(request_id="one")]
    assert bench.ledger.num_failed == 0


def ending(name: str) -> TokenBatch:
    """The engine's answer to an abort."""
    return TokenBatch(
        outputs=(
            TokenOutput(request_id=name, index=1, token_id=None, finish_reason=FinishReason.ABORT),
        )
    )


def test_a_stopped_request_still_says_its_last_word(bench: Bench) -> None:
    stream = bench.submit("one")
    bench.token("one", 0)

    async def stop() -> TokenOutput | None:
        last = asyncio.create_task(stream.stop())
        await asyncio.sleep(0)
        assert bench.sent[-1] == AbortRequest(request_id="one")
        bench.ledger.on_batch(ending("one"))
        return await last

    assert asyncio.run(stop()) == ending("one").outputs[0]
    assert bench.ledger.num_unfinished == 0


def test_nobody_waits_for_the_last_word_of_a_dead_engine(bench: Bench) -> None:
    stream = bench.submit("one")

    async def stop() -> TokenOutput | None:
        last = asyncio.create_task(stream.stop())
        await asyncio.sleep(0)
        bench.ledger.on_engine_lost()
        return await asyncio.wait_for(last, LAST_OUTPUT_S / 2)

    assert asyncio.run(stop()) is None
    other = bench.submit("other")
    assert asyncio.run(asyncio.wait_for(other.stop(), LAST_OUTPUT_S / 2)) is None
    assert lose_engine(bench) == []


def test_a_silent_engine_is_waited_for_briefly(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_stream, "LAST_OUTPUT_S", 0.01)
    stream = bench.submit("one")
    assert asyncio.run(stream.stop()) is None
    assert bench.ledger.num_unfinished == 0


def test_what_cannot_be_sent_is_not_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: AddRequest | AbortRequest) -> None:
        raise OverflowError(message.request_id)

    monkeypatch.setattr(bench.ledger, "_send", refuse)
    with pytest.raises(OverflowError):
        bench.submit("one")
    assert bench.ledger.num_unfinished == 0
    monkeypatch.undo()
    assert bench.submit("one").cancel() is None


def test_a_request_that_can_never_fit_names_the_limit(bench: Bench) -> None:
    with pytest.raises(CapacityError, match=r"60 tokens and max_tokens is 5.*at most 64") as caught:
        bench.submit("one", prompt=60, max_tokens=5)
    assert caught.value.field == "max_tokens"
    with pytest.raises(CapacityError) as caught:
        bench.submit("one", prompt=64, max_tokens=1)
    assert caught.value.field == "prompt"
    assert bench.refused == [RefusalReason.TOO_LONG] * 2
    bench.submit("one", prompt=60, max_tokens=4)


def test_a_full_queue_refuses_and_says_when_to_return(bench: Bench) -> None:
    for number in range(NUM_ACTIVE + 3):
        bench.submit(str(number))
    with pytest.raises(Unavailable) as caught:
        bench.submit("one more")
    assert caught.value.retry_after_s > 0
    assert bench.refused == [RefusalReason.QUEUE_FULL]


def test_refused_clients_are_sent_back_at_the_rate_of_service(bench: Bench) -> None:
    for number in range(NUM_ACTIVE + 3):
        bench.submit(str(number))

    def refused_s() -> float:
        with pytest.raises(Unavailable, match="max_queued_requests") as caught:
            bench.submit("one more")
        return caught.value.retry_after_s

    assert refused_s() == UNKNOWN_S
    for number in range(3):  # a place every 8 seconds, taken at once by somebody else
        bench.now_s += 8.0
        bench.token(str(number), 0, last=True)
        bench.submit(f"next {number}")
    assert [refused_s() for _ in range(3)] == [8.0, 16.0, 24.0]
    bench.now_s += 8.0
    bench.token("3", 0, last=True)
    bench.submit("next 3")
    assert refused_s() == 24.0, "two are still on their way"
    assert max(refused_s() for _ in range(20)) == LONGEST_S


def test_who_passed_others_is_suspected_too(bench: Bench) -> None:
    for name in ("one", "two", "small", "four"):
        bench.submit(name)
    for _ in range(2):  # "one" or "two" waits, and "small" runs in its place
        bench.token("small", 0)
        bench.ledger.on_engine_lost()
        bench.sent.clear()
        bench.ledger.on_engine_ready()
    assert sent_ids(bench) == ["one", "four"], "of three suspects one; four is free"


def test_a_request_id_in_use_is_refused(bench: Bench) -> None:
    bench.submit("one")
    with pytest.raises(InputError, match="in use"):
        bench.submit("one")


def test_drain_refuses_new_requests_and_waits_for_the_others(bench: Bench) -> None:
    stream = bench.submit("one")

    async def drain() -> int:
        draining = asyncio.create_task(bench.ledger.drain(timeout_s=5.0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            bench.submit("two")
        assert bench.refused == [RefusalReason.DRAINING]
        assert not draining.done()
        bench.token("one", 0, last=True)
        return await draining

    assert asyncio.run(drain()) == 0
    assert tokens_of(stream) == [1000]


def test_drain_cuts_off_what_is_left(bench: Bench) -> None:
    stream = bench.submit("one")
    assert asyncio.run(bench.ledger.drain(timeout_s=0.01)) == 1
    assert read(stream)[-1].finish_reason is FinishReason.ABORT
    assert bench.sent[-1] == AbortRequest(request_id="one")


def word(name: str, index: int) -> int:
    """What the model says: a function of the request and the position alone."""
    return hash((name, index)) % 50_000


@dataclass
class Running:
    """A request inside the scripted engine."""

    add: AddRequest
    index: int


class CrashingEngine(RuleBasedStateMachine):
    """Any interleaving of clients, steps, deaths and restarts, against a scripted engine.

    Each step's batch is delivered, or lost with a death, or delivered after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.streams: dict[str, tuple[RequestStream, int]] = {}
        self.cancelled: set[str] = set()
        self.running: dict[str, Running] = {}
        self.late: TokenBatch | None = None
        self.up = False

    def take_messages(self) -> None:
        for message in self.bench.sent:
            if isinstance(message, AbortRequest):
                self.running.pop(message.request_id, None)
            else:
                self.running[message.request_id] = Running(
                    add=message, index=len(message.generated_tokens)
                )
        self.bench.sent.clear()

    def step(self) -> TokenBatch:
        self.take_messages()
        outputs = []
        for name, state in list(self.running.items())[:NUM_ACTIVE]:
            last = state.index + 1 == state.add.sampling.max_tokens
            outputs.append(
                TokenOutput(
                    request_id=name,
                    index=state.index,
                    token_id=word(name, state.index),
                    finish_reason=FinishReason.LENGTH if last else None,
                )
            )
            state.index += 1
            if last:
                del self.running[name]
        return TokenBatch(outputs=tuple(outputs))

    @rule(max_tokens=st.integers(1, 5))
    def submit(self, max_tokens: int) -> None:
        name = f"request {len(self.streams)}"
        try:
            stream = self.bench.submit(name, max_tokens=max_tokens)
        except Unavailable:
            assert self.bench.ledger.num_unfinished == NUM_ACTIVE + 3
        else:
            self.streams[name] = (stream, max_tokens)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.streams)))
        self.streams[name][0].cancel()
        self.cancelled.add(name)

    @precondition(lambda self: self.up)
    @rule()
    def run_step(self) -> None:
        self.bench.ledger.on_batch(self.step())

    @precondition(lambda self: self.up)
    @rule(fate=st.sampled_from(["delivered", "lost", "late"]))
    def die(self, fate: str) -> None:
        batch = self.step()
        if fate == "delivered":
            self.bench.ledger.on_batch(batch)
        self.late = batch if fate == "late" else None
        self.bench.ledger.on_engine_lost()
        self.running.clear()
        self.bench.sent.clear()
        self.up = False

    @precondition(lambda self: not self.up)
    @rule()
    def die_while_loading(self) -> None:
        self.bench.ledger.on_engine_lost()

    @precondition(lambda self: not self.up)
    @rule()
    def restart(self) -> None:
        self.up = True
        self.bench.ledger.on_engine_ready()
        if self.late is not None:
            self.bench.ledger.on_batch(self.late)
            self.late = None

    @invariant()
    def sends_only_to_a_living_engine(self) -> None:
        assert self.up or not self.bench.sent

    def teardown(self) -> None:
        if not self.up:
            self.restart()
        while self.bench.ledger.num_unfinished:
            self.run_step()
        for name, (stream, max_tokens) in self.streams.items():
            outputs = read(stream)
            spoken = [output.token_id for output in outputs if output.token_id is not None]
            assert spoken == [word(name, index) for index in range(len(spoken))]
            finish = outputs[-1].finish_reason if outputs else None
            if finish is FinishReason.LENGTH:
                assert len(spoken) == max_tokens
            else:
                assert finish is FinishReason.ERROR or name in self.cancelled


TestCrashingEngine = CrashingEngine.TestCase
TestCrashingEngine.settings = settings(max_examples=60, stateful_step_count=30)


@dataclass
class Told:
    """A request of the machine below. It kills the engine at token ``poison``; None: never."""

    stream: RequestStream
    max_tokens: int
    poison: int | None


class PoisonedEngine(RuleBasedStateMachine):
    """An engine that dies of certain requests at certain tokens, and of nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(num_active=4)
        self.told: dict[str, Told] = {}
        self.running: dict[str, Running] = {}
        self.num_deaths = 0
        self.bench.ledger.on_engine_ready()

    @rule(max_tokens=st.integers(1, 40), poison=st.none() | st.integers(0, 39))
    def submit(self, max_tokens: int, poison: int | None) -> None:
        name = f"request {len(self.told)}"
        if self.bench.ledger.num_unfinished < 7:
            stream = self.bench.submit(name, max_tokens=max_tokens)
            self.told[name] = Told(stream, max_tokens, poison)

    @rule(num_steps=st.integers(1, 8), delivered=st.booleans())
    def run_steps(self, num_steps: int, delivered: bool) -> None:
        """``delivered``: whether the tokens of the step before a death still arrive."""
        for _ in range(num_steps):
            self.step(delivered=delivered)

    def step(self, *, delivered: bool) -> None:
        for message in self.bench.sent:
            assert isinstance(message, AddRequest)
            index = len(message.generated_tokens)
            self.running[message.request_id] = Running(add=message, index=index)
        self.bench.sent.clear()
        names = list(self.running)[:4]
        if fatal := {name for name in names if self.told[name].poison == self.running[name].index}:
            batch = self.batch([name for name in names if name not in fatal])
            self.die(batch if delivered else None)
        elif names:
            self.bench.ledger.on_batch(self.batch(names))

    def batch(self, names: list[str]) -> TokenBatch:
        outputs = []
        for name in names:
            index = self.running[name].index
            last = index + 1 == self.told[name].max_tokens
            outputs.append(
                TokenOutput(
                    request_id=name,
                    index=index,
                    token_id=word(name, index),
                    finish_reason=FinishReason.LENGTH if last else None,
                )
            )
            self.running[name].index += 1
            if last:
                del self.running[name]
        return TokenBatch(outputs=tuple(outputs))

    def die(self, last_batch: TokenBatch | None) -> None:
        self.num_deaths += 1
        self.running.clear()
        if last_batch is not None:
            self.bench.ledger.on_batch(last_batch)
        self.bench.ledger.on_engine_lost()
        self.bench.sent.clear()
        self.bench.ledger.on_engine_ready()

    @invariant()
    def runs_at_most_one_suspect(self) -> None:
        known = {*self.running, *sent_ids(self.bench)}
        suspects = [
            entry
            for name, entry in self.bench.ledger._entries.items()
            if entry.record.is_suspect and name in known
        ]
        assert len(suspects) <= 1

    def teardown(self) -> None:
        num_steps = 0
        while self.bench.ledger.num_unfinished:
            self.step(delivered=True)
            num_steps += 1
            assert num_steps < 5000, "somebody waits for ever"
        for name, told in self.told.items():
            fatal = told.poison is not None and told.poison < told.max_tokens
            outputs = read(told.stream)
            spoken = [output.token_id for output in outputs if output.token_id is not None]
            length = told.poison if fatal else told.max_tokens
            assert spoken == [word(name, index) for index in range(length or 0)]
            reason = FinishReason.ERROR if fatal else FinishReason.LENGTH
            assert outputs[-1].finish_reason is reason
        assert self.num_deaths <= 4 * self.bench.ledger.num_failed


TestPoisonedEngine = PoisonedEngine.TestCase
TestPoisonedEngine.settings = settings(max_examples=60, stateful_step_count=20)
