"""Recordings: what is noted, what is left out, and that nothing can be read back from them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.controller.bench.planning import WorkloadOptions, plan_workload
from sparsed.controller.cli.main import run
from sparsed.controller.ledger import Ledger, LedgerLimits
from sparsed.controller.recorder import BLOCK_TOKENS, LEASE_S, PART_BLOCKS, Recorder
from sparsed.controller.recording_file import write_recording
from sparsed.controller.workload import load_workload
from sparsed.core import (
    AddRequest,
    FinishReason,
    InputError,
    RecordedRequest,
    SamplingParams,
    TokenBatch,
    TokenOutput,
)


@dataclass
class Bench:
    now_s: float = 100.0
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.recorder = Recorder(clock=lambda: self.now_s)

    def start(self, duration_s: float | None = None, max_requests: int | None = None) -> int:
        return self.recorder.start(duration_s=duration_s, max_requests=max_requests)

    def serve(self, name: str, prompt: tuple[int, ...] = (1, 2), output_tokens: int = 3) -> None:
        self.recorder.note_arrival(request(name, prompt))
        self.recorder.note_end(name, output_tokens=output_tokens)


def request(name: str, prompt: tuple[int, ...] = (1, 2)) -> AddRequest:
    sampling = SamplingParams(max_tokens=9)
    return AddRequest(request_id=name, prompt_tokens=prompt, sampling=sampling)


def test_sizes_and_times_are_noted() -> None:
    bench = Bench()
    number = bench.start()
    bench.now_s += 2.5
    bench.recorder.note_arrival(request("a", tuple(range(600))))
    bench.now_s += 1.0
    assert bench.recorder.take(number, stop=False).num_running == 1
    bench.recorder.note_end("a", output_tokens=4)
    part = bench.recorder.take(number, stop=False)
    (noted,) = part.requests
    assert noted == RecordedRequest(
        arrival_s=2.5, input_tokens=600, output_tokens=4, max_tokens=9, block_ids=(0, 1)
    )
    assert not part.is_over and bench.recorder.take(number, stop=False).requests == ()


def test_what_arrived_before_or_never_answered_is_left_out() -> None:
    bench = Bench()
    bench.recorder.note_arrival(request("before"))
    number = bench.start()
    bench.recorder.note_end("before", output_tokens=5)
    bench.serve("refused", output_tokens=0)
    bench.recorder.note_arrival(request("long"))
    part = bench.recorder.take(number, stop=True)
    assert (part.requests, part.num_running, part.num_left_out, part.is_over) == ((), 0, 2, True)
    bench.recorder.note_end("long", output_tokens=5)  # its recording is forgotten
    assert bench.recorder.take(bench.start(), stop=True).num_left_out == 0


@pytest.mark.parametrize("limits", [{"duration_s": 5.0}, {"max_requests": 1}])
def test_after_either_limit_running_requests_are_waited_for(limits: dict[str, Any]) -> None:
    bench = Bench()
    number = bench.start(**limits)
    bench.recorder.note_arrival(request("a"))
    bench.now_s += 5.0
    bench.serve("late")
    assert not bench.recorder.take(number, stop=False).is_over
    bench.recorder.note_end("a", output_tokens=1)
    part = bench.recorder.take(number, stop=False)
    assert len(part.requests) == 1 and part.is_over
    with pytest.raises(InputError, match="does not run"):
        bench.recorder.take(number, stop=False)


def test_a_second_recording_is_refused_until_the_first_is_over_or_abandoned() -> None:
    bench = Bench()
    first = bench.start()
    bench.now_s += LEASE_S
    with pytest.raises(InputError, match="recording 1 runs already, with 0 requests"):
        bench.start()
    bench.now_s += 1.0
    second = bench.start()
    assert second != first
    with pytest.raises(InputError, match="does not run"):
        bench.recorder.take(first, stop=False)
    assert bench.recorder.take(second, stop=True).is_over
    bench.start()


def test_an_abandoned_recording_keeps_nothing_more() -> None:
    bench = Bench()
    number = bench.start()
    bench.now_s += LEASE_S + 1.0
    bench.serve("a")
    with pytest.raises(InputError):
        bench.recorder.take(number, stop=True)


def test_parts_are_bounded_and_lose_nothing() -> None:
    bench = Bench()
    number = bench.start()
    prompt = tuple(range(BLOCK_TOKENS * (PART_BLOCKS // 4)))[: BLOCK_TOKENS * 300]
    count = 2 * PART_BLOCKS // 300
    for name in range(count):
        bench.serve(str(name), prompt)
    found = 0
    while not (part := bench.recorder.take(number, stop=True)).is_over:
        assert sum(len(item.block_ids) for item in part.requests) <= PART_BLOCKS + 300
        found += len(part.requests)
    assert found + len(part.requests) == count and found


prompts = st.lists(st.lists(st.integers(0, 1), max_size=4), min_size=1, max_size=6)


@given(prompts, st.integers(1, BLOCK_TOKENS))
def test_ids_are_equal_exactly_as_far_as_the_prefixes_are(
    shapes: list[list[int]], tail: int
) -> None:
    bench = Bench()
    number = bench.start()
    texts = [
        tuple(token for block in shape for token in (block,) * BLOCK_TOKENS) + (7,) * tail
        for shape in shapes
    ]
    for name, text in enumerate(texts):
        bench.serve(str(name), text)
    found = bench.recorder.take(number, stop=True).requests
    for one, left in zip(found, texts, strict=True):
        assert len(one.block_ids) == -(-len(left) // BLOCK_TOKENS)
        for other, right in zip(found, texts, strict=True):
            for count, (a, b) in enumerate(zip(one.block_ids, other.block_ids, strict=False), 1):
                assert (a == b) == (left[: count * BLOCK_TOKENS] == right[: count * BLOCK_TOKENS])
    # Numbers in the order of first sight tell nothing else of what they stand for.
    seen = list(dict.fromkeys(item for one in found for item in one.block_ids))
    assert seen == list(range(len(seen)))


def test_the_ledger_tells_of_every_end() -> None:
    ledger = Ledger(
        LedgerLimits(max_tokens=64, max_waiting=3, num_active=lambda: 4),
        send=lambda _message: None,
        arrive=lambda *, input_tokens: None,
        observe=lambda *, ttft_s, tpot_s, output_tokens: None,
        refuse=lambda _reason: None,
        clock=lambda: 0.0,
        draw_seed=lambda: 1,
    )
    number = ledger.recorder.start(duration_s=None, max_requests=None)
    ledger.on_engine_ready()
    ledger.submit(request("done"))
    gone = ledger.submit(request("gone"))
    ledger.submit(request("cut"))
    outputs = [
        TokenOutput(request_id=name, index=0, token_id=5, finish_reason=reason)
        for name, reason in (("done", FinishReason.LENGTH), ("gone", None))
    ]
    ledger.on_batch(TokenBatch(outputs=tuple(outputs)))
    gone.cancel()
    ledger.cut_off_all("the end")
    part = ledger.recorder.take(number, stop=False)
    assert [item.output_tokens for item in part.requests] == [1, 1]
    assert (part.num_running, part.num_left_out) == (0, 1)


def test_a_trace_is_read_by_tune_and_bench(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    late = RecordedRequest(
        arrival_s=1.5, input_tokens=600, output_tokens=4, max_tokens=9, block_ids=(0, 2)
    )
    early = RecordedRequest(
        arrival_s=0.25, input_tokens=700, output_tokens=5, max_tokens=5, block_ids=(0, 1)
    )
    write_recording(file, [late, early])
    assert file.stat().st_mode & 0o077 == 0
    assert json.loads(file.read_text().splitlines()[1]) == {
        "timestamp": 1500.0,
        "input_length": 600,
        "output_length": 4,
        "max_tokens": 9,
        "hash_ids": [0, 2],
    }
    for requests in (
        load_workload(str(file)).requests,
        plan_workload(WorkloadOptions(trace=file)).workload.requests,
    ):
        assert [item.input_tokens for item in requests] == [700, 600]
        assert [item.block_ids for item in requests] == [(0, 1), (0, 2)]
        assert requests[1].arrival_s - requests[0].arrival_s == pytest.approx(1.25)


def test_a_file_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("before")

    def full(_fd: int) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_recording(file, [])
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


# ---- the verb ----------------------------------------------------------------------------------


def record(daemon: Any, *arguments: str) -> int:
    return run(["record", *arguments, "--state-dir", str(daemon.place.root)])


def soon(work: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(0.5, work)
    timer.start()
    return timer


def serve_on(daemon: Any, count: int) -> None:
    """As the ledger would, on the loop of the daemon, once a recording runs."""

    async def serve() -> None:
        for name in map(str, range(count)):
            daemon.control.recorder.note_arrival(request(name))
            daemon.control.recorder.note_end(name, output_tokens=2)

    deadline = time.monotonic() + 20
    while daemon.control.recorder._recording is None and time.monotonic() < deadline:
        time.sleep(0.02)
    daemon.run(serve())


def test_record_writes_what_was_served(
    daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.jsonl"
    soon(lambda: serve_on(daemon, 3))
    assert record(daemon, "--output", str(file), "--max-requests", "2") == 0
    assert capsys.readouterr().out == f"{file}: 2 requests\n"
    assert [item.output_tokens for item in load_workload(str(file)).requests] == [2, 2]


def test_ctrl_c_keeps_what_was_recorded(daemon: Any, tmp_path: Path) -> None:
    def serve_and_press() -> None:
        serve_on(daemon, 1)
        os.kill(os.getpid(), signal.SIGINT)

    file = tmp_path / "trace.jsonl"
    soon(serve_and_press)
    assert record(daemon, "--output", str(file)) == 0
    assert len(load_workload(str(file)).requests) == 1


def test_nothing_served_writes_nothing(
    daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.jsonl"
    assert record(daemon, "--output", str(file), "--seconds", "0.1") == 1
    assert "nothing is written" in capsys.readouterr().err and not file.exists()


def test_a_second_record_is_refused(
    daemon: Any, client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.start_recording(duration_s=None, max_requests=None)
    assert record(daemon, "--output", str(tmp_path / "t.jsonl")) == 1
    assert "runs already" in capsys.readouterr().err


@pytest.mark.parametrize("limits", [{"duration_s": 0.0}, {"max_requests": -1}])
def test_limits_are_checked_by_the_daemon(client: Any, limits: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        client.start_recording(**({"duration_s": None, "max_requests": None} | limits))
    assert [caught.value.field] == list(limits)


def test_a_place_that_cannot_be_written_is_named_first(daemon: Any, tmp_path: Path) -> None:
    assert record(daemon, "--output", str(tmp_path / "no" / "t.jsonl")) == 1
    assert daemon.control.recorder._recording is None
