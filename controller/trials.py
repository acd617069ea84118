"""Serves a workload on a real engine under given knobs, and says what it took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from sparsed.controller.config import DaemonConfig
from sparsed.controller.prompts import PromptSource
from sparsed.controller.startup import StartPlan, prepare
from sparsed.controller.supervisor import Supervisor
from sparsed.controller.trial_window import TrialWindow, link_rate
from sparsed.controller.workload import ServiceTimes, reordered, to_messages
from sparsed.core import (
    KNOB_SPECS,
    AddRequest,
    ApplyKnobs,
    EngineStats,
    FailureCause,
    InputError,
    KnobClass,
    Knobs,
    KnobsApplied,
    KnobValue,
    Measurement,
    Profiling,
    StartError,
    TokenBatch,
    TrialStatus,
    Workload,
    WorkloadRequest,
)
from sparsed.engine.wire import FromEngine
from sparsed.profiler.device_memory import open_device_memory
from sparsed.tuner.objective import TrialFailed

PROBE_INPUT_TOKENS: Final = 512
PROBE_OUTPUT_TOKENS: Final = 16
START_DEADLINE_S: Final = 300.0
STATUSES: Final = {
    FailureCause.DEVICE_MEMORY: TrialStatus.OUT_OF_MEMORY,
    FailureCause.HOST_MEMORY: TrialStatus.HOST_OUT_OF_MEMORY,
    FailureCause.DEVICE: TrialStatus.DEVICE_ERROR,
    FailureCause.CONFIG: TrialStatus.INVALID_CONFIG,
    FailureCause.HANG: TrialStatus.TIMEOUT,
    FailureCause.KILLED: TrialStatus.INTERRUPTED,  # which says nothing of the configuration
    FailureCause.OTHER: TrialStatus.ENGINE_ERROR,
}
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
        self._closing: asyncio.Task[None] | None = None  # the end of the last one
        self._knobs = plan.spec.knobs  # of the running engine
        self._inbox: asyncio.Queue[FromEngine | str] = asyncio.Queue()  # str: why it was lost
        self._stats = EngineStats()
        self._num_windows = 0
        self._num_changes = 0  # of knobs, of running engines
        self._recall_stride = plan.spec.recall_stride
        self.calibration = plan.spec.calibration  # of the link, as far as it is known by now
        self._link_bytes_per_s: float | None = None  # of the running engine
        self.versions: Mapping[str, str] = {}

    @property
    def device(self) -> str:
        """Its name: cpu or cuda:N."""
        return self._plan.spec.device

    def take_calibration(self, other: EngineBench) -> None:
        """Copy pages as ``other`` does, over the same kind of link: trials then compare."""
        if self._plan.spec.link == other._plan.spec.link:
            self.calibration = other.calibration

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
        """End the engine; the next measurement starts another one. Goes on where it is cancelled:
        the next call then waits for the end."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            self._closing = asyncio.create_task(supervisor.stop(STOP_TIMEOUT_S))
        if self._closing is not None:
            await asyncio.shield(self._closing)

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
            # Not from the database, which two devices must not open at the same time: migrations
            # go by what is global to the process.
            spec = prepare(
                config,
                progress=lambda _phase, _frac: None,
                find_calibration=lambda _link: self.calibration,
            ).spec
            self._supervisor = Supervisor(
                replace(spec, recall_stride=self._recall_stride),
                run_dir=config.state_dir.run_dir,
                on_message=self._receive,
                on_lost=self._inbox.put_nowait,
            )
            async with asyncio.timeout(START_DEADLINE_S):
                facts = await self._supervisor.start()
            self.versions = facts.versions
            self.calibration = facts.calibration or self.calibration
            self._link_bytes_per_s = link_rate(facts)
        except InputError as error:
            raise TrialFailed(str(error), status=TrialStatus.INVALID_CONFIG) from error
        except StartError as error:
            await self.close()
            raise TrialFailed(str(error), status=STATUSES[error.cause]) from error
        except TimeoutError:
            await self.close()
            raise TrialFailed(
                f"it was not loaded after {START_DEADLINE_S:.0f} s", status=TrialStatus.TIMEOUT
            ) from None

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
            assert self._supervisor is not None
            status = STATUSES[self._supervisor.cause]
            await self.close()
            raise TrialFailed(f"the engine was lost: {message}", status=status)
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
        window = TrialWindow(started_s=time.monotonic())
        sender = asyncio.create_task(self._send(messages, workload=workload, window=window))
        try:
            with open_device_memory(self._gpu_index) as read_frac:
                while len(window.done) < len(messages):
                    message = await self._next()
                    if isinstance(message, TokenBatch):
                        window.take(message)
                    elif isinstance(message, EngineStats):
                        window.look(message, hbm_frac=read_frac())
                window.look(self._stats, hbm_frac=read_frac())
        finally:
            sender.cancel()
        window.ended_s = time.monotonic()
        while self._stats.generated_tokens < before.generated_tokens + window.num_tokens:
            await self._next()  # the counters that hold the last step
        return window.measurement(
            before=before, after=self._stats, link_bytes_per_s=self._link_bytes_per_s
        )

    @property
    def _gpu_index(self) -> int | None:
        kind, _, index = self._plan.spec.device.partition(":")
        return int(index) if kind == "cuda" else None

    async def _send(
        self, messages: tuple[AddRequest, ...], *, workload: Workload, window: TrialWindow
    ) -> None:
        for message, request in zip(messages, workload.requests, strict=True):
            wait_s = window.started_s + request.arrival_s - time.monotonic()
            await asyncio.sleep(max(0.0, wait_s))
            window.expect(message.request_id, sent_s=time.monotonic())
            assert self._supervisor is not None
            self._supervisor.send(message)


def _needs_restart(running: Knobs, wanted: Knobs) -> bool:
    return any(getattr(running, name) != getattr(wanted, name) for name in RESTART_KNOBS)
