"""The worker as the controller sees it: a process with a socket, signals and an exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import zmq

from sparsed.core import (
    AbortRequest,
    AddRequest,
    ApplyKnobs,
    EngineFailed,
    EngineReady,
    EngineSpec,
    EngineStats,
    ExitCode,
    FailureCause,
    FinishReason,
    Heartbeat,
    Knobs,
    KnobsApplied,
    LoadProgress,
    SamplingParams,
    Shutdown,
    TokenBatch,
    TokenOutput,
)
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import plan_memory
from sparsed.engine.wire import FromEngine, ToEngine, decode, encode
from sparsed.engine.worker import Link, StepClock

# Patience is counted in looks, not in seconds: a busy machine may stand still for many of them.
NUM_LOOKS = 600
LOOK_S = 0.2
KNOBS = Knobs(
    token_budget=256,
    hbm_budget=None,
    max_num_active_seqs=4,
    prefill_chunk=256,
    page_size=16,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=4,
    kv_hbm_gib=0.03,
    kv_dram_gib=0.03,
    max_model_len=2048,
)
SPEC = EngineSpec(
    model="dummy:tiny",
    device="cpu",
    dtype="float32",
    knobs=KNOBS,
    plan=plan_memory(KNOBS, shape=dummy_config("dummy:tiny").shape, dtype="float32"),
)
Kind = TypeVar("Kind", bound=FromEngine)


class Controller:
    """The other end: binds, spawns, talks."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/engine.sock"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.bind(self.endpoint)
        self.seen: list[FromEngine] = []
        self.process: subprocess.Popen[str] | None = None

    def spawn(self) -> None:
        command = [sys.executable, "-P", "-m", "sparsed.engine.worker", "--endpoint", self.endpoint]
        with os.fdopen(os.memfd_create("pool"), "wb") as pool:
            self.process = subprocess.Popen(
                [*command, "--parent", str(os.getpid()), "--pool-fd", str(pool.fileno())],
                pass_fds=(pool.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )

    def send(self, message: ToEngine) -> None:
        self._socket.send(encode(message))

    def receive(self) -> FromEngine:
        for _ in range(NUM_LOOKS):
            if self._socket.poll(LOOK_S * 1000):
                break
            assert self.process is None or self.process.poll() is None, self.last_words()
        else:
            pytest.fail(f"silence after {self.seen[-3:]}")
        message = decode(self._socket.recv())
        assert not isinstance(message, ToEngine)
        self.seen.append(message)
        return message

    def wait_for(
        self, kind: type[Kind], accept: Callable[[Kind], bool] = lambda message: True
    ) -> Kind:
        while True:
            message = self.receive()
            if isinstance(message, kind) and accept(message):
                return message

    def outputs(self, request_id: str) -> list[TokenOutput]:
        """All of one request, up to its last."""
        found: list[TokenOutput] = []
        while not (found and found[-1].finish_reason):
            batch = self.wait_for(TokenBatch)
            found += [output for output in batch.outputs if output.request_id == request_id]
        return found

    def exit_status(self) -> int:
        assert self.process is not None
        for _ in range(NUM_LOOKS):
            if (status := self.process.poll()) is not None:
                return status
            time.sleep(LOOK_S)
        pytest.fail("the worker does not end")

    def last_words(self) -> str:
        """What the ended worker wrote to its standard error."""
        assert self.process is not None
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stderr is not None
            self.process.stderr.close()
        self._socket.close(linger=0)
        self._context.term()


@contextmanager
def controller(directory: Path) -> Iterator[Controller]:
    made = Controller(directory)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """A worker with the tiny model; the tests of this module share it."""
    with controller(tmp_path_factory.mktemp("engine")) as made:
        made.spawn()
        made.send(SPEC)
        made.wait_for(EngineReady)
        yield made


def request(name: str, *, num_prompt: int = 300, **params: Any) -> AddRequest:
    return AddRequest(
        request_id=name,
        prompt_tokens=tuple(7 * i % 500 for i in range(num_prompt)),
        sampling=SamplingParams(**{"max_tokens": 40, "temperature": 0.0, **params}),
    )


pytestmark = pytest.mark.slow


def test_it_says_how_far_it_is_and_what_it_loaded(loaded: Controller) -> None:
    ready = next(message for message in loaded.seen if isinstance(message, EngineReady))
    before = loaded.seen[: loaded.seen.index(ready)]
    assert isinstance(loaded.seen[0], Heartbeat | LoadProgress)
    assert len({message.phase for message in before if isinstance(message, LoadProgress)}) > 1
    assert loaded.process is not None
    assert ready.facts.pid == loaded.process.pid
    assert ready.facts.weights_bytes > 0


def test_a_replayed_request_goes_on_with_the_same_text(loaded: Controller) -> None:
    loaded.send(request("whole"))
    whole = loaded.outputs("whole")
    assert [output.index for output in whole] == list(range(40))
    text = [output.token_id for output in whole if output.token_id is not None]
    loaded.send(replace(request("half"), generated_tokens=tuple(text[:15])))
    half = loaded.outputs("half")
    assert [output.token_id for output in half] == text[15:]
    assert [output.index for output in half] == list(range(15, 40))
    details = half[-1].sparse
    assert details is not None
    assert details.sparse_steps > 0, "the text must come from sparse attention"


def test_every_way_of_sampling_works_on_the_logits_of_the_model(loaded: Controller) -> None:
    tuned = request(
        "tuned",
        temperature=0.8,
        top_p=0.9,
        min_p=0.01,
        seed=3,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        logit_bias=((11, 4.0),),
        logprobs=2,
        prompt_logprobs=1,
    )
    texts = []
    for name in ("once", "again"):
        loaded.send(replace(tuned, request_id=name))
        found = loaded.outputs(name)
        texts.append([output.token_id for output in found])
        assert found[0].prompt_logprobs is not None
        assert len(found[0].prompt_logprobs) == 300
        assert all(len(output.top_logprobs) == 2 for output in found)
    assert texts[0] == texts[1]


def test_requests_run_together_and_can_be_aborted(loaded: Controller) -> None:
    loaded.send(request("short", max_tokens=5))
    loaded.send(request("endless", max_tokens=1500))
    assert loaded.outputs("short")[-1].finish_reason is FinishReason.LENGTH
    loaded.send(AbortRequest(request_id="endless"))
    last = loaded.outputs("endless")[-1]
    assert last.finish_reason is FinishReason.ABORT
    assert last.token_id is None
    idle = loaded.wait_for(EngineStats, lambda stats: stats.num_running == 0)
    assert idle.dram_used_bytes == 0


def test_a_request_that_never_fits_leaves_it_serving(loaded: Controller) -> None:
    loaded.send(request("huge", max_tokens=5000))
    (refusal,) = loaded.outputs("huge")
    assert refusal.finish_reason is FinishReason.ERROR
    assert "max_model_len" in str(refusal.error)
    loaded.send(request("small", max_tokens=1))
    assert len(loaded.outputs("small")) == 1


def test_knobs_are_applied_or_refused_by_name(loaded: Controller) -> None:
    wanted = replace(KNOBS, prefill_chunk=64)
    loaded.send(ApplyKnobs(change_id=7, knobs=wanted))
    assert loaded.wait_for(KnobsApplied) == KnobsApplied(change_id=7, knobs=wanted)
    loaded.send(ApplyKnobs(change_id=8, knobs=replace(wanted, page_size=32)))
    refused = loaded.wait_for(KnobsApplied)
    assert (refused.change_id, refused.knobs) == (8, wanted)
    assert "page_size" in str(refused.error)


def test_it_reports_as_often_as_it_beats_while_idle(loaded: Controller) -> None:
    """That is every second; two threads of one process, each with a clock of its own."""
    loaded.wait_for(EngineStats)
    num_seen = len(loaded.seen)
    for _ in range(3):
        loaded.wait_for(EngineStats)
    assert 1 <= sum(isinstance(one, Heartbeat) for one in loaded.seen[num_seen:]) <= 9
    beat = loaded.wait_for(Heartbeat)
    assert beat.step_age_s == 0.0
    assert beat.step_id > 40


def test_with_the_profiler_off_it_reports_nothing(loaded: Controller) -> None:
    loaded.send(ApplyKnobs(change_id=9, knobs=replace(KNOBS, profiler="off")))
    assert loaded.wait_for(KnobsApplied).knobs.profiler == "off"
    loaded.seen.clear()
    loaded.send(request("unseen", max_tokens=20))
    assert len(loaded.outputs("unseen")) == 20
    for _ in range(3):
        loaded.wait_for(Heartbeat)
    assert not [message for message in loaded.seen if isinstance(message, EngineStats)]
    loaded.send(ApplyKnobs(change_id=10, knobs=KNOBS))
    loaded.wait_for(KnobsApplied)
    assert loaded.wait_for(EngineStats).generated_tokens > 20


def test_interrupts_are_for_the_controller_and_shutdown_is_clean(loaded: Controller) -> None:
    assert loaded.process is not None
    loaded.process.send_signal(signal.SIGINT)
    loaded.send(request("after", max_tokens=2))
    assert len(loaded.outputs("after")) == 2
    loaded.send(request("cut short", max_tokens=1500))
    loaded.send(Shutdown())
    assert loaded.exit_status() == ExitCode.OK


def test_an_unknown_model_is_a_failure_with_words_and_a_status(tmp_path: Path) -> None:
    with controller(tmp_path) as failing:
        failing.spawn()
        failing.send(replace(SPEC, model="dummy:nonsense"))
        failed = failing.wait_for(EngineFailed)
        assert "nonsense" in failed.message and failed.cause is FailureCause.CONFIG
        assert failed.exit_code == failing.exit_status() == ExitCode.USAGE


def test_an_error_in_its_own_logic_ends_the_process(tmp_path: Path) -> None:
    with controller(tmp_path) as broken:
        broken.spawn()
        broken.send(SPEC)
        for _ in range(2):
            broken.send(request("twice", max_tokens=1500))
        failed = broken.wait_for(EngineFailed)
        assert failed.cause is FailureCause.OTHER and "twice is unfinished" in failed.message
        assert broken.exit_status() == 1
        assert "twice is unfinished" in broken.last_words()


@pytest.mark.parametrize("loading", [False, True])
def test_sigterm_is_a_clean_exit(tmp_path: Path, loading: bool) -> None:
    with controller(tmp_path) as ending:
        ending.spawn()
        ending.wait_for(Heartbeat)
        if loading:
            ending.send(SPEC)
            ending.wait_for(LoadProgress)
        assert ending.process is not None
        ending.process.send_signal(signal.SIGTERM)
        assert ending.exit_status() == ExitCode.OK


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    with controller(tmp_path) as orphaned:
        command = [sys.executable, "-P", "-m", "sparsed.engine.worker"]
        command += ["--endpoint", orphaned.endpoint, "--parent"]
        code = f"import os, subprocess; p = subprocess.Popen({command!r} + [str(os.getpid())]); " \
               "print(p.pid, flush=True); p.wait()"  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdout is not None
            worker = psutil.Process(int(parent.stdout.readline()))
            orphaned.wait_for(Heartbeat)
            parent.kill()
        for _ in range(NUM_LOOKS):
            if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(LOOK_S)
        pytest.fail("the worker outlived its parent")


def test_it_ends_if_its_parent_was_gone_before_it_could_look(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-P", "-m", "sparsed.engine.worker"]
    command += ["--endpoint", f"ipc://{tmp_path}/engine.sock", "--parent", str(gone.pid)]
    assert subprocess.run(command, check=False, timeout=30).returncode == ExitCode.UNAVAILABLE


def test_the_link_beats_while_a_step_is_stuck(tmp_path: Path) -> None:
    with controller(tmp_path) as watching:
        clock = StepClock()
        link = Link(watching.endpoint, clock=clock)
        try:
            clock.start()
            first = watching.wait_for(Heartbeat)
            second = watching.wait_for(Heartbeat)
            assert second.step_id == 1
            assert second.step_age_s > first.step_age_s + 0.5
            clock.stop()
            assert watching.wait_for(Heartbeat).step_age_s == 0.0
        finally:
            link.close()


def test_the_link_keeps_the_order_and_loses_nothing(tmp_path: Path) -> None:
    with controller(tmp_path) as reading:
        link = Link(reading.endpoint, clock=StepClock())
        sent = [LoadProgress(phase=str(number), frac=0.0) for number in range(3000)]
        for message in sent[:-1]:
            link.send(message)
        received = [reading.wait_for(LoadProgress) for _ in sent[:-1]]
        link.send(sent[-1])
        link.close()
        assert [*received, reading.wait_for(LoadProgress)] == sent
