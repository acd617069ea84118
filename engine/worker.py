"""The engine process: ``python -m sparsed.engine.worker --endpoint ipc://... --parent PID --pool-fd N``.

The controller binds the endpoint and sends an EngineSpec; the worker loads, says how far it is,
and answers with EngineReady, or with EngineFailed and its exit code. Then it takes requests and
knobs between steps and sends a TokenBatch per step, EngineStats every second (with the profiler
off only while knobs are being applied) and, from a thread of its own, a Heartbeat every second. An
error in a step ends the process with a traceback, after an EngineFailed that says what kind of
error it was.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import zmq

from sparsed.core import (
    AbortRequest,
    AddRequest,
    ApplyKnobs,
    EngineFacts,
    EngineFailed,
    EngineReady,
    EngineSpec,
    ExitCode,
    FailureCause,
    Heartbeat,
    InputError,
    KnobsApplied,
    LoadProgress,
    Shutdown,
    StartError,
)
from sparsed.engine.failures import cause_of, in_words
from sparsed.engine.process import die_with_parent
from sparsed.engine.wire import Message, decode, encode

if TYPE_CHECKING:
    from sparsed.engine.engine import Engine

HEARTBEAT_S = 1.0
STATS_S = 1.0
SPEC_TIMEOUT_S = 60.0
SIGNAL_CHECK_S = 0.2
LINGER_S = 10.0  # for the last messages of a worker that ends; a busy reader takes seconds
_STOP = b""  # between the threads: no more messages


class StepClock:
    """Which step is running since when. Written by the engine's thread, read by the link's."""

    def __init__(self) -> None:
        self._step_id = 0
        self._started: float | None = None

    def start(self) -> None:
        self._step_id += 1
        self._started = time.monotonic()

    def stop(self) -> None:
        self._started = None

    def heartbeat(self) -> Heartbeat:
        started = self._started  # read once: the other thread may clear it in between
        age = 0.0 if started is None else time.monotonic() - started
        return Heartbeat(step_id=self._step_id, step_age_s=age)


class Link:
    """The socket to the controller, in a thread of its own: it beats while a step computes.

    ZeroMQ sockets belong to one thread, so the engine talks to the link's thread over a second,
    in-process pair. Nothing is ever dropped: the queues have no limit.
    """

    def __init__(self, endpoint: str, *, clock: StepClock) -> None:
        self._context = zmq.Context()
        self._context.setsockopt(zmq.SNDHWM, 0)
        self._context.setsockopt(zmq.RCVHWM, 0)
        self._context.setsockopt(zmq.LINGER, int(LINGER_S * 1000))
        self._clock = clock
        far = self._context.socket(zmq.PAIR)
        far.connect(endpoint)
        self._near, inner = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._near.bind("inproc://link")
        self._near.setsockopt(zmq.SNDTIMEO, int(LINGER_S * 1000))  # a dead thread must show
        inner.connect("inproc://link")
        self._thread = threading.Thread(target=self._forward, args=(far, inner), daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        self._near.send(encode(message))

    def receive(self, *, timeout_s: float) -> Message | None:
        """The next message, None if there is none for ``timeout_s``."""
        if not self._near.poll(_whole_ms(timeout_s)):
            return None
        return decode(self._near.recv())

    def close(self) -> None:
        """Send what is queued, then end the thread."""
        self._near.send(_STOP)
        self._thread.join()
        self._near.close()
        self._context.term()

    def _forward(self, far: zmq.Socket[bytes], inner: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(far, zmq.POLLIN)
        poller.register(inner, zmq.POLLIN)
        next_beat = time.monotonic()
        with far, inner:
            while True:
                ready = dict(poller.poll(_whole_ms(next_beat - time.monotonic())))
                if far in ready:
                    inner.send(far.recv())
                if inner in ready:
                    if (data := inner.recv()) == _STOP:
                        return
                    far.send(data)
                if time.monotonic() >= next_beat:
                    far.send(encode(self._clock.heartbeat()))
                    next_beat = time.monotonic() + HEARTBEAT_S


def _whole_ms(seconds: float) -> int:
    """Milliseconds, rounded up: a wait must not turn into a spin."""
    return max(0, math.ceil(seconds * 1000))


class Worker:
    """The loop between the link and the engine."""

    def __init__(self, link: Link, *, engine: Engine, clock: StepClock) -> None:
        self._link = link
        self._engine = engine
        self._clock = clock
        self._stats_due = time.monotonic()
        self._changes: list[int] = []  # of knobs, that are not answered
        self._told_applying = False  # in the last report
        self._stopping = False

    def serve(self, stopped: threading.Event) -> None:
        """Until Shutdown, or until ``stopped`` is set."""
        while not (self._stopping or stopped.is_set()):
            self.turn()

    def turn(self) -> None:
        """Everything that is due once; waits for messages where there is nothing to do."""
        self._take_messages()
        self._send_stats_if_due()
        if self._engine.has_work:
            self._step()
        self._answer_changes()

    def _take_messages(self) -> None:
        """All that came; waits for the first one while the engine is idle."""
        idle_s = max(0.0, self._stats_due - time.monotonic())
        timeout_s = 0.0 if self._engine.has_work else idle_s
        while (message := self._link.receive(timeout_s=timeout_s)) is not None:
            self._handle(message)
            timeout_s = 0.0

    def _handle(self, message: Message) -> None:
        match message:
            case AddRequest():
                self._engine.add(message)
            case AbortRequest(request_id=request_id):
                self._engine.abort(request_id)
            case ApplyKnobs():
                self._apply(message)
            case Shutdown():
                self._stopping = True
            case _:
                raise AssertionError(f"the controller sent {type(message).__name__}")

    def _apply(self, message: ApplyKnobs) -> None:
        change_id = message.change_id
        try:
            self._engine.apply(message.knobs)
        except InputError as refusal:
            answer = KnobsApplied(change_id=change_id, knobs=self._engine.knobs, error=str(refusal))
            self._link.send(answer)
        else:
            self._changes.append(change_id)
            self._answer_changes()

    def _answer_changes(self) -> None:
        """Tell that the newest change of knobs is in force, also to those whom it overtook."""
        if self._changes and self._engine.applying is None:
            for change_id in self._changes:
                self._link.send(KnobsApplied(change_id=change_id, knobs=self._engine.knobs))
            self._changes.clear()

    def _step(self) -> None:
        self._clock.start()
        batch = self._engine.step()
        self._clock.stop()
        if batch.outputs:
            self._link.send(batch)

    def _send_stats_if_due(self) -> None:
        if time.monotonic() < self._stats_due:
            return
        is_applying = self._engine.applying is not None
        if self._engine.knobs.is_profiled or is_applying or self._told_applying:
            self._link.send(self._engine.stats())
            self._told_applying = is_applying
        self._stats_due = time.monotonic() + STATS_S


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """Serve until told to stop; the exit status for the shell."""
    parser = argparse.ArgumentParser(prog="python -m sparsed.engine.worker", description=__doc__)
    parser.add_argument("--endpoint", required=True, help="ZeroMQ address the controller binds")
    parser.add_argument("--parent", required=True, type=int, help="pid of the process it serves")
    parser.add_argument("--pool-fd", type=int, help="open file that backs the DRAM tier")
    arguments = parser.parse_args(argv)
    die_with_parent(arguments.parent)
    stopped = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the controller to handle
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stopped.set())
    clock = StepClock()
    link = Link(arguments.endpoint, clock=clock)
    try:
        engine = _load(link, pool_fd=arguments.pool_fd, stopped=stopped)
        Worker(link, engine=engine, clock=clock).serve(stopped)
    except StartError as error:
        link.send(EngineFailed(message=str(error), exit_code=error.code, cause=error.cause))
        return error.code
    except Exception as error:
        link.send(
            EngineFailed(
                message=in_words(error), exit_code=ExitCode.SOFTWARE, cause=cause_of(error)
            )
        )
        raise
    finally:
        link.close()
    return ExitCode.OK


def _load(link: Link, *, pool_fd: int | None, stopped: threading.Event) -> Engine:
    """The engine the first message describes. StartError with the reason if there is none."""
    spec = _receive_spec(link, stopped)

    def report(phase: str, frac: float) -> None:
        if stopped.is_set():
            raise SystemExit(ExitCode.OK)
        link.send(LoadProgress(phase=phase, frac=frac))

    report("loading torch", 0.0)
    try:
        engine, facts = _build(spec, pool_fd=pool_fd, on_progress=report)
    except StartError:
        raise
    except InputError as error:
        raise StartError(str(error), code=error.code, cause=FailureCause.CONFIG) from error
    except Exception as error:
        traceback.print_exc()
        raise StartError(in_words(error), code=ExitCode.SOFTWARE, cause=cause_of(error)) from error
    link.send(EngineReady(facts=facts))
    return engine


def _receive_spec(link: Link, stopped: threading.Event) -> EngineSpec:
    deadline = time.monotonic() + SPEC_TIMEOUT_S
    while not stopped.is_set():
        message = link.receive(timeout_s=SIGNAL_CHECK_S)
        if isinstance(message, EngineSpec):
            return message
        if message is not None or time.monotonic() > deadline:
            words = "no message" if message is None else type(message).__name__
            raise StartError(
                f"the engine got {words} where its spec was expected", code=ExitCode.SOFTWARE
            )
    raise SystemExit(ExitCode.OK)


def _build(
    spec: EngineSpec, *, pool_fd: int | None, on_progress: Callable[[str, float], None]
) -> tuple[Engine, EngineFacts]:
    # Imported here: loading torch takes seconds, and the link is already beating by now.
    from sparsed.engine.engine import Engine
    from sparsed.engine.runner import Runner

    runner = Runner(spec, on_progress=on_progress, pool_fd=pool_fd)
    return Engine(runner, knobs=spec.knobs, seed=spec.seed, service=spec.service), runner.facts


if __name__ == "__main__":
    sys.exit(main())
