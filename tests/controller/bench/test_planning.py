"""Plans are reproducible and keep what their options say; equal hash ids give equal tokens."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sparsed.controller.bench.lengths import LognormalLengths, UniformLengths, parse_lengths
from sparsed.controller.bench.planning import WorkloadOptions, plan_workload
from sparsed.controller.bench.prompts import (
    BLOCK_TOKENS,
    PLAIN_WORDS,
    PromptMaker,
    TokenIds,
    to_text,
)
from sparsed.controller.cli.bench_serve import DEFAULT_VOCAB_SIZE
from sparsed.core import InputError, WorkloadRequest

TRACE = Path(__file__).resolve().parents[3] / "examples" / "traces" / "conversation.jsonl"
IDS = TokenIds.below(DEFAULT_VOCAB_SIZE)
lengths = st.one_of(
    st.tuples(st.integers(1, 5000), st.integers(0, 5000)).map(
        lambda pair: UniformLengths(low=pair[0], high=pair[0] + pair[1])
    ),
    st.builds(LognormalLengths, median=st.floats(1, 5000), sigma=st.floats(0, 4)),
)
options = st.builds(
    WorkloadOptions,
    num_prompts=st.integers(1, 40),
    request_rate_per_s=st.none() | st.floats(0.01, 1000) | st.just(math.inf),
    burstiness=st.floats(0.1, 10),
    input_lengths=st.none() | lengths,
    output_lengths=st.none() | lengths,
    shared_prefix_tokens=st.integers(0, 600),
    max_input_tokens=st.none() | st.integers(1, 4000),
    max_output_tokens=st.none() | st.integers(1, 400),
    seed=st.integers(),
)


def request(input_tokens: int, *block_ids: int) -> WorkloadRequest:
    return WorkloadRequest(
        arrival_s=0.0, input_tokens=input_tokens, output_tokens=1, block_ids=block_ids
    )


@given(options)
def test_a_plan_keeps_its_options(options: WorkloadOptions) -> None:
    plan = plan_workload(options)
    assert plan == plan_workload(options)
    requests = plan.workload.requests
    assert len(requests) == options.num_prompts
    arrivals_s = [item.arrival_s for item in requests]
    assert arrivals_s == sorted(arrivals_s) and arrivals_s[0] == 0.0
    if options.request_rate_per_s in (None, math.inf):
        assert set(arrivals_s) == {0.0}
    for item in requests:
        assert 1 <= item.input_tokens <= (options.max_input_tokens or math.inf)
        assert 1 <= item.output_tokens <= (options.max_output_tokens or math.inf)
        if isinstance(lengths := options.input_lengths, UniformLengths):
            own = item.input_tokens - options.shared_prefix_tokens
            assert own <= lengths.high
            assert own >= lengths.low or item.input_tokens == options.max_input_tokens
    if options.max_input_tokens is None and options.max_output_tokens is None:
        assert plan.num_clipped == 0


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_gaps_have_the_asked_rate_and_burstiness(burstiness: float, variation: float) -> None:
    plan = plan_workload(
        WorkloadOptions(num_prompts=20_000, request_rate_per_s=8.0, burstiness=burstiness)
    )
    arrivals_s = [item.arrival_s for item in plan.workload.requests]
    gaps_s = [later - earlier for earlier, later in pairwise(arrivals_s)]
    assert statistics.mean(gaps_s) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps_s) * 8 == pytest.approx(variation, rel=0.07)


def test_seeds_differ() -> None:
    plans = [
        plan_workload(WorkloadOptions(request_rate_per_s=1.0, seed=seed)).workload.requests
        for seed in (1, 2)
    ]
    assert plans[0] != plans[1]


def test_lognormal_lengths_have_their_median() -> None:
    plan = plan_workload(
        WorkloadOptions(
            num_prompts=5000, input_lengths=parse_lengths("lognormal:400:0.8", field="input-len")
        )
    )
    drawn = [item.input_tokens for item in plan.workload.requests]
    assert statistics.median(drawn) == pytest.approx(400, rel=0.05)
    assert statistics.stdev([math.log(length) for length in drawn]) == pytest.approx(0.8, rel=0.05)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "0", "-5", "1.5", "5:3", "1:2:3", "99999999999"),
        *("lognormal", "lognormal:5", "lognormal:0:1", "lognormal:5:nan", "lognormal:inf:1"),
    ],
)
def test_bad_lengths_are_named(text: str) -> None:
    with pytest.raises(InputError, match=r"--input-len.*LOW:HIGH") as caught:
        parse_lengths(text, field="input-len")
    assert caught.value.field == "input-len"


def test_a_trace_is_replayed() -> None:
    plan = plan_workload(WorkloadOptions(trace=TRACE, time_scale=2.0))
    assert len(plan.workload.requests) == 400
    assert plan.workload.name == "conversation"
    assert plan.workload.requests[-1].arrival_s == pytest.approx(141 / 2)
    first = plan.workload.requests[0]
    assert (first.input_tokens, first.output_tokens, len(first.block_ids)) == (6758, 500, 14)


def test_parts_of_a_trace_can_be_replaced() -> None:
    plan = plan_workload(
        WorkloadOptions(
            trace=TRACE,
            num_prompts=50,
            request_rate_per_s=math.inf,
            output_lengths=UniformLengths(low=7, high=7),
            max_input_tokens=4000,
        )
    )
    requests = plan.workload.requests
    assert {item.arrival_s for item in requests} == {0.0}
    assert {item.output_tokens for item in requests} == {7}
    assert max(item.input_tokens for item in requests) == 4000
    assert plan.num_unused == 350
    assert plan.num_clipped == sum(item.input_tokens == 4000 for item in requests) > 0


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"time_scale": 2.0}, "time-scale"),
        ({"trace": TRACE, "time_scale": 0.0}, "time-scale"),
        ({"trace": TRACE, "time_scale": 2.0, "request_rate_per_s": 1.0}, "time-scale"),
        ({"trace": TRACE, "shared_prefix_tokens": 8}, "shared-prefix-len"),
        ({"trace": TRACE, "num_prompts": 401}, "num-prompts"),
        ({"trace": Path("/nowhere/trace.jsonl")}, "trace"),
        ({"request_rate_per_s": 0.0}, "request-rate"),
        ({"request_rate_per_s": math.nan}, "request-rate"),
        ({"burstiness": -1.0}, "burstiness"),
    ],
)
def test_bad_options_are_named(bad: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=f"--{field}") as caught:
        plan_workload(WorkloadOptions(**bad))  # type: ignore[arg-type]  # of many types
    assert caught.value.field == field


def test_a_broken_line_of_a_trace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    good = TRACE.read_text().splitlines()[0]
    file.write_text(f"{good}\n{good.replace('[0,', '[0.5, [],')}\n")
    with pytest.raises(InputError, match="line 2 of the trace"):
        plan_workload(WorkloadOptions(trace=file))


@given(
    st.lists(st.integers(0, 20), max_size=6),
    st.lists(st.integers(0, 20), max_size=6),
    st.integers(1, 4000),
    st.integers(1, 4000),
)
def test_equal_ids_give_equal_tokens_and_others_do_not(
    first: list[int], second: list[int], first_tokens: int, second_tokens: int
) -> None:
    maker = PromptMaker(ids=IDS, seed=0)
    one = maker.tokens("0", request(first_tokens, *first))
    two = maker.tokens("1", request(second_tokens, *second))
    assert (len(one), len(two)) == (first_tokens, second_tokens)
    assert all(1000 <= token < 9000 for token in one + two)
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    common = min(shared * BLOCK_TOKENS, first_tokens, second_tokens)
    assert one[:common] == two[:common]
    beyond = common + 8  # eight equal tokens of 8000 by chance: never
    assert len(one) < beyond or len(two) < beyond or one[common:beyond] != two[common:beyond]


def test_prompts_follow_seed_and_label() -> None:
    def tokens(seed: int, label: str) -> list[int]:
        return PromptMaker(ids=IDS, seed=seed, shared_prefix_tokens=40).tokens(label, request(50))

    assert tokens(0, "a") == tokens(0, "a")
    assert tokens(0, "a")[:40] == tokens(0, "b")[:40]
    assert tokens(0, "a")[40:] != tokens(0, "b")[40:]
    assert tokens(0, "a")[:40] != tokens(1, "a")[:40]


@pytest.mark.parametrize(("vocab_size", "first"), [(9000, 1000), (128_256, 1000), (512, 128)])
def test_special_tokens_at_the_beginning_are_avoided(vocab_size: int, first: int) -> None:
    ids = TokenIds.below(vocab_size)
    assert (ids.first, ids.end) == (first, vocab_size)
    tokens = PromptMaker(ids=ids, seed=0).tokens("a", request(50_000))
    assert first <= min(tokens) and max(tokens) < vocab_size


def test_the_default_ids_of_a_real_vocabulary_are_plain(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    ids = TokenIds.below(DEFAULT_VOCAB_SIZE)
    assert ids.end <= tokenizer.get_vocab_size()
    assert not set(range(ids.first, ids.end)) & set(tokenizer.get_added_tokens_decoder())
    num_words = len(PLAIN_WORDS.split())
    text = to_text(range(num_words))
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == num_words


def test_text_has_a_word_for_each_token() -> None:
    text = to_text([1000, 8999, 1000])
    first, second, third = text.split()
    assert first == third != second
