"""Workloads are read, cut to size and turned into requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.controller.workload import (
    PRESETS,
    ServiceTimes,
    expected_s,
    fit_workload,
    load_workload,
    parse_trace,
    recall_stride,
    reordered,
    to_messages,
)
from sparsed.core import InputError, Workload, WorkloadRequest

FAST = ServiceTimes(prompt_tokens_per_s=100_000.0, output_token_s=0.0001)
SLOW = ServiceTimes(prompt_tokens_per_s=500.0, output_token_s=0.03)


def row(timestamp: float = 0, input_length: object = 10, output_length: object = 5) -> str:
    return json.dumps(
        {"timestamp": timestamp, "input_length": input_length, "output_length": output_length}
    )


def test_a_trace_is_sorted_and_in_seconds(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join((row(1500, 7, 3), row(0))))
    workload = load_workload(str(file))
    assert workload.name == "trace"
    assert workload.requests == (
        WorkloadRequest(arrival_s=0.0, input_tokens=10, output_tokens=5),
        WorkloadRequest(arrival_s=1.5, input_tokens=7, output_tokens=3),
    )


DEEP = 100_000 * '{"timestamp": '


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "{}", DEEP, row(-1), row(float("nan")), row(0, 0), row(0, 1, 0), row(0, "x")],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(f"{row()}\n{line}\n{row()}\n")
    with pytest.raises(InputError, match="line 2 of the workload"):
        load_workload(str(file))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "line 1 of the trace: it is not a JSON object; write one with timestamp"),
        ('{"timestamp": 0}', "input_length is missing; give tokens, a whole number, 1 or more"),
        (row(-1), "timestamp is -1; give milliseconds, 0 or more"),
        (row(0, 0), "input_length is 0; give tokens"),
        (row(0, 1, None), "output_length is null; give tokens"),
        (row(0, True), "input_length is true; give tokens"),
        (row(0, [1]), "input_length is a list; give tokens"),
        (row(0, 1.9), "input_length is 1.9; give tokens, a whole number"),
        (row(0, "10"), 'input_length is "10"; give tokens'),
        (row(0, 1, 10**400), "output_length is 1000000"),
        (row(0, "x" * 999), 'input_length is "xxx'),
        (row()[:-1] + ', "hash_ids": 5}', "hash_ids is no list of whole numbers; give one"),
        (row()[:-1] + ', "hash_ids": [1, "2"]}', "hash_ids is no list of whole numbers"),
    ],
)
def test_a_bad_line_names_its_field_and_the_remedy(line: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_trace([line], field="trace")
    assert says in str(caught.value) and len(str(caught.value)) < 200
    assert "Error" not in str(caught.value) and caught.value.field == "trace"


@given(
    st.lists(st.tuples(st.integers(1, 99), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(0, 40),
    st.integers(0, 3),
)
def test_another_order_serves_the_same_requests_at_the_same_times(
    sizes: list[tuple[int, int]], order: int, seed: int
) -> None:
    workload = Workload(
        name="any",
        requests=tuple(
            WorkloadRequest(arrival_s=float(at), input_tokens=size[0], output_tokens=size[1])
            for at, size in enumerate(sizes)
        ),
    )
    other = reordered(workload, order=order, seed=seed)
    assert other == reordered(workload, order=order, seed=seed)
    assert [item.arrival_s for item in other.requests] == [float(at) for at in range(len(sizes))]
    served = [(item.input_tokens, item.output_tokens) for item in other.requests]
    assert sorted(served) == sorted(sizes)
    assert order or served == sizes


def test_orders_and_seeds_differ() -> None:
    workload = load_workload("mixed")
    drawn = [reordered(workload, order=order, seed=seed) for order in (1, 2) for seed in (0, 1)]
    assert len({item.requests for item in (workload, *drawn)}) == 5


def test_hash_ids_name_the_blocks_of_a_prompt_until_it_is_scaled() -> None:
    (request,) = parse_trace(
        ['{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [3, 9]}']
    )
    assert request.block_ids == (3, 9)
    fitted = fit_workload(
        Workload(name="w", requests=(request,)), max_tokens=8192, window_s=60.0, times=FAST
    )
    assert fitted.workload.requests[0].block_ids == ()


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_file_without_requests_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "trace.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="workload"):
        load_workload(str(file))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(InputError, match="chat, documents, mixed"):
        load_workload("chatt")


def test_where_there_is_time_nothing_is_cut() -> None:
    workload = load_workload("chat")
    fitted = fit_workload(workload, max_tokens=8192, window_s=60.0, times=FAST)
    assert fitted.workload == workload
    assert fitted.description == "32 of 32 requests, lengths x 1, longest prompt 2200 tokens"


def test_long_prompts_are_kept_before_many() -> None:
    fitted = fit_workload(load_workload("documents"), max_tokens=8192, window_s=20.0, times=SLOW)
    lengths = [item.input_tokens for item in fitted.workload.requests]
    assert len(lengths) == 2
    assert min(lengths) > 4000


def test_the_mixed_preset_begins_with_a_long_prompt_and_a_short_one() -> None:
    fitted = fit_workload(load_workload("mixed"), max_tokens=8192, window_s=6.0, times=SLOW)
    long, short = (item.input_tokens for item in fitted.workload.requests)
    assert long > 5 * short


@given(
    st.lists(
        st.builds(
            WorkloadRequest,
            arrival_s=st.floats(0, 1e6),
            input_tokens=st.integers(1, 200_000),
            output_tokens=st.integers(1, 5_000),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(128, 200_000),
    st.floats(0.5, 100.0),
)
def test_a_fitted_workload_fits(
    requests: list[WorkloadRequest], max_tokens: int, window_s: float
) -> None:
    requests.sort(key=lambda request: request.arrival_s)
    workload = Workload(name="w", requests=tuple(requests))
    fitted = fit_workload(workload, max_tokens=max_tokens, window_s=window_s, times=SLOW)
    kept = fitted.workload.requests
    assert 1 <= len(kept) <= len(requests)
    assert all(item.input_tokens + item.output_tokens <= max_tokens for item in kept)
    assert all(0.0 <= item.arrival_s <= 0.5 * window_s * 1.001 for item in kept)
    smallest = 2 * (32 / SLOW.prompt_tokens_per_s + 8 * SLOW.output_token_s)
    assert expected_s(kept, times=SLOW) <= window_s + smallest


def test_messages_have_exactly_their_output() -> None:
    workload = load_workload("chat")
    prompts = [(1, number) for number in range(len(workload.requests))]
    messages = to_messages(workload, prompts=prompts, prefix="a")
    assert [message.prompt_tokens for message in messages] == prompts
    assert {message.sampling.max_tokens for message in messages} == {180, 250, 150, 300}
    assert all(message.sampling.ignore_eos for message in messages)
    assert len({message.request_id for message in messages}) == len(messages)
    assert set(PRESETS) == {"chat", "documents", "mixed"}


@pytest.mark.parametrize(
    ("output_tokens", "stride"), [(1, 1), (8, 1), (17, 2), (120, 14), (5_000, 32)]
)
def test_recall_is_sampled_often_enough_for_the_longest_prompt(
    output_tokens: int, stride: int
) -> None:
    sizes = ((100, 900), (3_000, output_tokens), (200, 900))
    requests = (
        WorkloadRequest(arrival_s=0.0, input_tokens=prompt, output_tokens=output)
        for prompt, output in sizes
    )
    assert recall_stride(Workload(name="w", requests=tuple(requests))) == stride
