"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from torch import Tensor

from sparsed.core import (
    KNOB_SPECS,
    AddRequest,
    EngineStats,
    FinishReason,
    InputError,
    KnobClass,
    KnobProgress,
    Knobs,
    RefusalReason,
    Service,
    SparseDetails,
    TokenBatch,
    TokenOutput,
)
from sparsed.engine.admission import GATES, Gate
from sparsed.engine.batch import StepPlan
from sparsed.engine.outputs import add_prompt_logprobs, output_of
from sparsed.engine.quality import Attention, QualityGuard
from sparsed.engine.readback import InFlight, PendingTokens
from sparsed.engine.recorder import Drawn
from sparsed.engine.refusals import Refusals
from sparsed.engine.request import RequestState, Status, check_request, seed_of
from sparsed.engine.sampler import Draw, Sampler
from sparsed.engine.scheduler import Rows, Scheduler, Step

MAX_STEP_TIMES = 4096  # kept between two reports, should nobody ask for them
REBUDGET_STEPS = 64  # between two divisions of the hot tier among requests


class Cache(Rows, Attention, Protocol):
    """What the engine needs of the KV cache; ``KVCache`` is one."""

    def observe(self) -> None: ...
    def rebudget(self) -> None: ...
    def check_fits(self, num_tokens: int) -> None: ...
    def details(self, row: int, *, num_dropped: int) -> SparseDetails: ...


class Model(Protocol):
    """What the engine needs of the model and its tiers; ``Runner`` is one."""

    @property
    def kv(self) -> Cache: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def runs_ahead(self) -> bool: ...
    def run(self, plan: StepPlan) -> Drawn: ...
    def stats(self) -> EngineStats: ...
    def ask(self, knobs: Knobs) -> None: ...
    @property
    def readiness(self) -> float: ...
    @property
    def is_preparing(self) -> bool: ...
    def prepare(self, *, idle: bool) -> None: ...
    def apply(self, knobs: Knobs) -> None: ...


@dataclass(slots=True)
class _Counters:
    """The engine's own share of ``EngineStats``."""

    steps: int = 0
    step_s: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests_finished: int = 0


class Engine:
    """Continuous batching over one model. One thread; only ``step`` takes its time.

    Where the model runs ahead, the tokens that it draws are read while the next step runs:
    a request that ends has by then run one step more, whose token is dropped. ``gates``: what a
    request must pass to join, as in ``admission.py``.

    A request that cannot be served ends with an output that says so, at the next step. Any
    other error leaves the engine unusable and is raised.
    """

    def __init__(
        self,
        model: Model,
        *,
        knobs: Knobs,
        seed: int = 0,
        service: Service | None = None,
        gates: Sequence[Gate] = GATES,
    ) -> None:
        service = service or Service()
        self._model = model
        self._seed = seed
        self._scheduler = Scheduler(model.kv, knobs=knobs, target_s=service.tpot_s, gates=gates)
        self._quality = QualityGuard(model.kv, floor=service.recall_floor)
        self._refusals = Refusals()
        self._asked: Knobs | None = None  # not in force yet
        self._sampler = Sampler()
        self._in_flight: deque[InFlight] = deque()
        self._outputs: list[TokenOutput] = []  # of this step, and of requests closed before it
        self._counters = _Counters()
        self._step_times: deque[float] = deque(maxlen=MAX_STEP_TIMES)

    @property
    def knobs(self) -> Knobs:
        return self._scheduler.knobs

    @property
    def num_decoding(self) -> int:
        """Requests whose prompts are in the cache."""
        return self._scheduler.num_decoding

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to compute, to report or to get ready."""
        is_serving = self._scheduler.has_requests or bool(self._outputs or self._in_flight)
        return is_serving or self._model.is_preparing

    def add(self, request: AddRequest) -> None:
        """Queue a request. Its id must not be that of an unfinished one."""
        try:
            self._check(request)
        except InputError as error:
            self._refuse(request, error)
        else:
            self._scheduler.add(
                RequestState(request=request, seed=seed_of(request, engine_seed=self._seed))
            )

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens if it has ended already."""
        if request := self._scheduler.get(request_id):
            self._finish(request, reason=FinishReason.ABORT)

    def apply(self, knobs: Knobs) -> None:
        """Change hot knobs: from the next step on, or once the model is ready for them, which it
        gets between steps; ``applying`` tells. The newest change counts. InputError if a knob of a
        restart differs."""
        for spec in KNOB_SPECS:
            changed = getattr(knobs, spec.name) != getattr(self.knobs, spec.name)
            if changed and spec.klass is KnobClass.RESTART:
                raise InputError(f"{spec.name} changes only with a restart", field=spec.name)
        self._asked = knobs
        self._model.ask(knobs)
        self._take_asked()

    @property
    def applying(self) -> KnobProgress | None:
        """The change that is under way; None: what was asked for last is in force."""
        if self._asked is None:
            return None
        before, after = self.knobs.as_dict(), self._asked.as_dict()
        names = tuple(name for name in after if after[name] != before[name])
        return KnobProgress(names=names, frac=self._model.readiness)

    def step(self) -> TokenBatch:
        """One token for every decoding request, and the next part of the prompts."""
        started = time.perf_counter()
        self._model.prepare(idle=not (self._scheduler.has_requests or self._in_flight))
        self._take_asked()
        self._look()
        step = self._schedule()
        if not step.plan.is_empty:
            self._launch(step)
        self._read_tokens(keep=0 if step.plan.is_empty or not self._model.runs_ahead else 1)
        if not step.plan.is_empty:
            self._count(step, seconds=time.perf_counter() - started)
        return self._report()

    def stats(self) -> EngineStats:
        """Counters and gauges of now. ``recent_step_s`` are the steps since the last call."""
        recent = tuple(self._step_times)
        self._step_times.clear()
        queues = self._scheduler.queues
        return replace(
            self._model.stats(),
            **asdict(self._counters),
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_spilled=len(queues.spilled),
            spills=self._scheduler.num_spills,
            restores=self._scheduler.num_restores,
            quality_raises=self._quality.num_raises,
            quality_dense=self._quality.num_dense,
            waits=queues.waits,
            refusals=self._refusals.counts,
            waiting=queues.told,
            recent_quality=self._quality.take_events(),
            recent_step_s=recent,
            knobs=self.knobs,
            applying=self.applying,
        )

    def _look(self) -> None:
        """See what requests use, and act on it."""
        cache = self._model.kv
        cache.observe()
        self._quality.look(self._scheduler.queues.running.values(), knobs=self.knobs)
        if self._counters.steps % REBUDGET_STEPS == REBUDGET_STEPS - 1:
            cache.rebudget()

    def _take_asked(self) -> None:
        """Put what was asked for in force if the model is ready for it."""
        if self._asked is not None and self._model.readiness == 1.0:
            self._model.apply(self._asked)
            self._scheduler.knobs = self._asked
            self._quality.apply(self._scheduler.queues.with_rows, knobs=self._asked)
            self._asked = None

    def _schedule(self) -> Step:
        while head := self._scheduler.blocked():
            self._refusals.count(RefusalReason.HOT_TIER)
            budget = head.request.sparse.token_budget or self.knobs.token_budget
            self._finish(
                head,
                reason=FinishReason.ERROR,
                error=f"the hot tier cannot hold token_budget={budget} for this request even "
                "when it is alone; lower sparse.token_budget or raise kv_hbm_gib",
            )
        return self._scheduler.schedule()

    def _advance(self, step: Step, logits_NV: Tensor) -> list[tuple[RequestState, int]]:
        """Note the progress of prompts; who gets a token now, with the row of its logits."""
        ready = []
        row = 0
        for request, chunk in zip(step.prefills, step.plan.chunks, strict=True):
            num_rows = chunk.end - chunk.logits_from
            if request.wants_prompt_logprobs:
                add_prompt_logprobs(request, chunk, logits_NV[row : row + num_rows])
            request.advance_prefill(len(chunk.tokens))
            row += num_rows
            if request.status is Status.DECODE:
                ready.append((request, row - 1))
        ready.extend((request, row + i) for i, request in enumerate(step.decodes))
        return ready

    def _launch(self, step: Step) -> None:
        """Run a step. Tokens that the model does not draw are drawn here, on the host; the others
        stay in flight."""
        drawn = self._model.run(step.plan)
        ready = self._advance(step, drawn.logits_NV)
        drawing = [(request, row) for request, row in ready if not self._replay(request)]
        waiting = tuple(pair for pair in drawing if self._model_draws(pair[0]))
        for request, _ in waiting:
            request.num_in_flight += 1
        self._in_flight.append(InFlight(tokens=PendingTokens(drawn.tokens_N), waiting=waiting))
        self._sample([pair for pair in drawing if not self._model_draws(pair[0])], drawn.logits_NV)

    def _model_draws(self, request: RequestState) -> bool:
        return request.is_plain and (request.is_greedy or self._model.runs_ahead)

    def _sample(self, drawing: Sequence[tuple[RequestState, int]], logits_NV: Tensor) -> None:
        if not drawing:
            return
        requests = [request for request, _ in drawing]
        if len(drawing) < len(logits_NV):
            logits_NV = logits_NV[[row for _, row in drawing]]
        draws = self._sampler.sample(logits_NV, requests=requests)
        for request, draw in zip(requests, draws, strict=True):
            self._emit(request, draw)

    def _read_tokens(self, *, keep: int) -> None:
        """Report the tokens of all steps in flight but the last ``keep``."""
        while len(self._in_flight) > keep:
            step = self._in_flight.popleft()
            tokens = step.tokens.read()
            for request, row in step.waiting:
                request.num_in_flight -= 1
                if request.status is not Status.FINISHED:
                    self._emit(request, Draw(tokens[row]))

    def _replay(self, request: RequestState) -> bool:
        """Append the next token if it is known. True if none is to be drawn in this step."""
        token = request.forced_token
        if token is not None:
            request.append(token)
        reason = request.finish_reason
        if reason is not None:
            self._finish(request, reason=reason)
        return token is not None or reason is not None

    def _emit(self, request: RequestState, draw: Draw) -> None:
        request.append(draw.token_id)
        self._counters.generated_tokens += 1
        reason = request.finish_reason
        if reason is not None:
            self._finish(request, reason=reason, draw=draw)
        else:
            self._outputs.append(output_of(request, draw=draw))

    def _finish(
        self,
        request: RequestState,
        *,
        reason: FinishReason,
        draw: Draw | None = None,
        error: str | None = None,
    ) -> None:
        """Report the last output of a request and give back what it held."""
        details = None
        if request.row is not None:
            num_dropped = request.num_in_flight  # drawn, and never to be read
            details = self._model.kv.details(request.row, num_dropped=num_dropped)
        output = output_of(request, draw=draw)
        self._outputs.append(replace(output, finish_reason=reason, error=error, sparse=details))
        self._scheduler.finish(request)
        self._sampler.forget(request.request_id)
        self._quality.forget(request.request_id)
        self._counters.requests_finished += 1

    def _check(self, request: AddRequest) -> None:
        page_size, vocab_size = self.knobs.page_size, self._model.vocab_size
        check_request(request, page_size=page_size, vocab_size=vocab_size)
        self._model.kv.check_fits(len(request.prompt_tokens) + request.sampling.max_tokens)

    def _refuse(self, request: AddRequest, error: InputError) -> None:
        self._refusals.count_error(error)
        output = TokenOutput(
            request_id=request.request_id,
            index=len(request.generated_tokens),
            token_id=None,
            finish_reason=FinishReason.ERROR,
            error=str(error),
        )
        self._outputs.append(output)

    def _report(self) -> TokenBatch:
        outputs, self._outputs = self._outputs, []
        return TokenBatch(outputs=tuple(outputs))

    def _count(self, step: Step, *, seconds: float) -> None:
        self._counters.steps += 1
        self._counters.step_s += seconds
        self._counters.prompt_tokens += sum(len(chunk.tokens) for chunk in step.plan.chunks)
        self._step_times.append(seconds)
        self._scheduler.note_step(step, seconds=seconds)
