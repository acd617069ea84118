"""Serves a workload on a real engine under given knobs, and says what it took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sparsed.controller.config import DaemonConfig
from sparsed.controller.prompts import PromptSource
from sparsed.controller.startup import StartPlan, prepare
from sparsed.controller.supervisor import Supervisor
from sparsed.controller.workload import ServiceTimes, reordered, to_messages
from sparsed.core import (
    KNOB_SPECS,
    AddRequest,
    ApplyKnobs,
    EngineStats,
    FinishReason,
    InputError,
    KnobClass,
    Knobs,
    KnobsApplied,
    KnobValue,
    Measurement,
    Profiling,
    StartError,
    TokenBatch,
    TokenOutput,
    TrialStatus,
    Workload,
    WorkloadRequest,
)
from sparsed.engine.wire import FromEngine
from sparsed.tuner.objective import TrialFailed

PROBE_INPUT_TOKENS: Final = 512
PROBE_OUTPUT_TOKENS: Final = 16
START_DEADLINE_S: Final = 300.0
STOP_TIMEOUT_S: Final = 5.0
RESTART_KNOBS: Final = tuple(spec.name for spec in KNOB_SPECS if spec.klass is KnobClass.RESTART)


class EngineBench:
    """One engine at a time, started again where a knob asks for it.

    Lives on one event loop; the caller holds the lock of the state directory and closes it.
    Errors of every measurement: ``TrialFailed``, after which the next one starts a new engine.
    """

    def __init__(self, config: DaemonConfig, plan: StartPlan, *, prompts: PromptSource) -> None:
        self._config = config
        self._plan = plan
        self._prompts = prompts
        self._supervisor: Supervisor | None = None
        self._knobs = plan.spec.knobs  # of the running engine
        self._inbox: asyncio.Queue[FromEngine | str] = asyncio.Queue()  # str: why it was lost
        self._stats = EngineStats()
        self._num_windows = 0
        self._num_changes = 0  # of knobs, of running engines
        self._recall_stride = plan.spec.recall_stride
        self._calibration = plan.spec.calibration
        self.versions: Mapping[str, str] = {}

    async def probe(self) -> ServiceTimes:
        """What one request takes under the default, after one that warms up; one that attends
        sparsely where there is room, for such steps may be the slower ones."""
        knobs = self._plan.spec.knobs
        sparse_tokens = knobs.token_budget + 2 * knobs.page_size
        for input_tokens in (PROBE_INPUT_TOKENS, max(PROBE_INPUT_TOKENS, sparse_tokens)):
            request = WorkloadRequest(
                arrival_s=0.0,
                input_tokens=min(input_tokens, knobs.max_model_len // 2),
                output_tokens=min(PROBE_OUTPUT_TOKENS, knobs.max_model_len // 2),
            )
            workload = Workload(name="probe", requests=(request,))
            probed = await self.measure({}, workload=workload, deadline_s=START_DEADLINE_S)
        return ServiceTimes(
            prompt_tokens_per_s=request.input_tokens / probed.ttft_s[0],
            output_token_s=probed.tpot_s[0],
        )

    async def sample_recall(self, *, stride: int) -> None:
        """Measure attention recall every ``stride`` steps; ends an engine that does otherwise."""
        if stride != self._recall_stride:
            self._recall_stride = stride
            await self.close()

    async def measure(
        self,
        values: Mapping[str, KnobValue],
        *,
        workload: Workload,
        deadline_s: float,
        order: int = 0,
    ) -> Measurement:
        """Serve ``workload`` once with the default knobs changed by ``values``. ``order``: which
        arrival order, with prompts of its own; 0 is that of ``workload``."""
        await self._bring_up(values)
        try:
            async with asyncio.timeout(deadline_s):
                return await self._serve(workload, order=order)
        except TimeoutError:
            await self.close()
            raise TrialFailed(
                f"it was not done after {deadline_s:.0f} s", status=TrialStatus.TIMEOUT
            ) from None

    async def close(self) -> None:
        """End the engine; the next measurement starts another one."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            await supervisor.stop(STOP_TIMEOUT_S)

    # engine

    async def _bring_up(self, values: Mapping[str, KnobValue]) -> None:
        try:
            always = {"profiler": Profiling.ON.value}  # a trial is a measurement
            knobs = self._plan.spec.knobs.with_values({**values, **always})
        except InputError as error:
            raise TrialFailed(str(error), status=TrialStatus.INVALID_CONFIG) from error
        if self._supervisor is not None and knobs == self._knobs:
            return
        # What a running engine refuses (a chunk beyond its buffers) a fresh one may take.
        if (
            self._supervisor is None
            or _needs_restart(self._knobs, knobs)
            or not await self._apply(knobs)
        ):
            await self._restart(knobs)
        self._knobs = knobs

    async def _restart(self, knobs: Knobs) -> None:
        await self.close()
        self._inbox, self._stats = asyncio.Queue(), EngineStats()
        asked = {name: value for name, value in knobs.as_dict().items() if value is not None}
        config = replace(self._config, knobs=asked, no_profile=True)
        try:
            spec = prepare(config, progress=lambda _phase, _frac: None).spec
            self._supervisor = Supervisor(
                replace(
                    spec,
                    recall_stride=self._recall_stride,
                    calibration=self._calibration or spec.calibration,
                ),
                run_dir=config.state_dir.run_dir,
                on_message=self._receive,
                on_lost=self._inbox.put_nowait,
            )
            async with asyncio.timeout(START_DEADLINE_S):
                facts = await self._supervisor.start()
            self.versions = facts.versions
            self._calibration = facts.calibration or self._calibration
        except InputError as error:
            raise TrialFailed(str(error), status=TrialStatus.INVALID_CONFIG) from error
        except (StartError, TimeoutError) as error:
            await self.close()
            raise TrialFailed(str(error) or "slow start", status=_status(str(error))) from error

    async def _apply(self, knobs: Knobs) -> bool:
        assert self._supervisor is not None
        self._num_changes += 1
        self._supervisor.send(ApplyKnobs(change_id=self._num_changes, knobs=knobs))
        while True:
            message = await self._next()
            if isinstance(message, KnobsApplied) and message.change_id == self._num_changes:
                return message.error is None

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, EngineStats):
            self._stats = message
        self._inbox.put_nowait(message)

    async def _next(self) -> FromEngine:
        message = await self._inbox.get()
        if isinstance(message, str):
            await self.close()
            raise TrialFailed(f"the engine was lost: {message}", status=_status(message))
        return message

    # one window

    async def _serve(self, workload: Workload, *, order: int) -> Measurement:
        self._num_windows += 1
        seed = self._config.seed
        workload = reordered(workload, order=order, seed=seed)
        messages = to_messages(
            workload,
            prompts=self._prompts.make(workload, seed=seed + order),
            prefix=f"window-{self._num_windows}",
        )
        before = self._stats
        window = _Window(started_s=time.monotonic())
        sender = asyncio.create_task(self._send(messages, workload=workload, window=window))
        try:
            while len(window.done) < len(messages):
                message = await self._next()
                if isinstance(message, TokenBatch):
                    window.take(message)
                elif isinstance(message, EngineStats):
                    window.hot_peak_bytes = max(window.hot_peak_bytes, message.hot_used_bytes)
        finally:
            sender.cancel()
        window.ended_s = time.monotonic()
        while self._stats.generated_tokens < before.generated_tokens + window.num_tokens:
            await self._next()  # the counters that hold the last step
        return window.measurement(before=before, after=self._stats)

    async def _send(
        self, messages: tuple[AddRequest, ...], *, workload: Workload, window: _Window
    ) -> None:
        for message, request in zip(messages, workload.requests, strict=True):
            wait_s = window.started_s + request.arrival_s - time.monotonic()
            await asyncio.sleep(max(0.0, wait_s))
            window.timings[message.request_id] = _Timing(sent_s=time.monotonic())
            assert self._supervisor is not None
            self._supervisor.send(message)


@dataclass(slots=True)
class _Timing:
    """One request; times of this process's monotonic clock."""

    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


@dataclass(slots=True)
class _Window:
    """Everything seen of one window so far."""

    started_s: float
    ended_s: float = 0.0
    hot_peak_bytes: int = 0
    sparse_steps: int = 0
    timings: dict[str, _Timing] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        return sum(timing.num_tokens for timing in self.timings.values())

    def take(self, batch: TokenBatch) -> None:
        now_s = time.monotonic()
        for output in batch.outputs:
            if timing := self.timings.get(output.request_id):
                self._take_one(output, timing=timing, now_s=now_s)

    def _take_one(self, output: TokenOutput, *, timing: _Timing, now_s: float) -> None:
        if output.token_id is not None:
            timing.first_s = timing.first_s or now_s
            timing.last_s, timing.num_tokens = now_s, timing.num_tokens + 1
        if output.finish_reason is FinishReason.ERROR:
            reason = output.error or "a request failed"
            raise TrialFailed(reason, status=_status(reason))
        if output.finish_reason is not None:
            self.done.add(output.request_id)
            self.sparse_steps += output.sparse.sparse_steps if output.sparse else 0

    def measurement(self, *, before: EngineStats, after: EngineStats) -> Measurement:
        timings = self.timings.values()
        samples = after.recall_samples - before.recall_samples
        hits, misses = after.hot_hits - before.hot_hits, after.hot_misses - before.hot_misses
        recall = (after.recall_sum - before.recall_sum) / samples if samples else None
        return Measurement(
            duration_s=self.ended_s - self.started_s,
            output_tokens=self.num_tokens,
            ttft_s=tuple(timing.first_s - timing.sent_s for timing in timings),
            tpot_s=tuple(timing.tpot_s for timing in timings),
            sparse_steps=self.sparse_steps,
            attention_recall=recall,
            hot_hit_frac=hits / (hits + misses) if hits + misses else None,
            h2d_bytes=after.h2d_bytes - before.h2d_bytes,
            hot_peak_bytes=max(self.hot_peak_bytes, after.hot_used_bytes),
        )


def _needs_restart(running: Knobs, wanted: Knobs) -> bool:
    return any(getattr(running, name) != getattr(wanted, name) for name in RESTART_KNOBS)


def _status(reason: str) -> TrialStatus:
    """The kernel ends a process that takes too much memory by SIGKILL; torch says it in words."""
    memory = "memory" in reason or "SIGKILL" in reason
    return TrialStatus.OUT_OF_MEMORY if memory else TrialStatus.ENGINE_ERROR
