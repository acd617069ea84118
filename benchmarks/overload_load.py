"""Requests of the overload benchmark: when they come, how they reach an engine, what became of them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sparsed.core import AddRequest, SamplingParams, SparseMode, SparseOptions
from sparsed.core import TokenOutput as Output
from sparsed.engine.batch import StepPlan
from sparsed.engine.engine import Engine, Model

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """``count`` requests of equal sizes; ``rate`` a second on average (Poisson), inf: at once."""

    count: int
    prompt_tokens: int
    output_tokens: int
    rate: float = math.inf
    seed: int = 0

    def arrivals_s(self) -> list[float]:
        """Rising, the first at 0. Two rates have the same gaps but for their scale."""
        draws = random.Random(self.seed)
        gaps = [draws.expovariate(1.0) / self.rate for _ in range(self.count - 1)]
        return [0.0, *map(float, np.cumsum(gaps))]


class Prompts:
    """Prompts cut from ``tokens``, one behind the other and around again, or drawn at random
    without. Each begins with its number, by which ``Watched`` knows it."""

    def __init__(self, *, vocab_size: int, tokens: Sequence[int] = (), seed: int = 0) -> None:
        self._vocab_size = vocab_size
        self._tokens = tokens
        self._seed = seed

    def make(self, number: int, num_tokens: int) -> tuple[int, ...]:
        """``number`` is below the size of the vocabulary."""
        assert number < self._vocab_size, "more requests than tokens to name them by"
        if self._tokens:
            first = number * num_tokens
            places = (place % len(self._tokens) for place in range(first + 1, first + num_tokens))
            return (number, *(self._tokens[place] for place in places))
        draws = np.random.default_rng((self._seed, number))
        return (number, *draws.integers(0, self._vocab_size, num_tokens - 1).tolist())


@dataclass(slots=True)
class Course:
    """Of one request, seconds since the load began. ``started_s``: the first part of its prompt is
    about to be computed. ``error``: why it was refused."""

    arrived_s: float
    started_s: float | None = None
    tokens_s: list[float] = field(default_factory=list)
    is_over: bool = False
    error: str | None = None


class Watched:
    """A model that notes in ``started_s`` when the first token of each prompt, by which it is known,
    is first computed."""

    def __init__(self, model: Model, *, clock: Clock = time.perf_counter) -> None:
        self.started_s: dict[int, float] = {}
        self._model = model
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run(self, plan: StepPlan) -> Any:
        for chunk in plan.chunks:
            if chunk.start == 0:
                self.started_s.setdefault(chunk.tokens[0], self._clock())
        return self._model.run(plan)


class Front(Protocol):
    """Hands requests to an engine."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: AddRequest) -> None: ...
    def settle(self) -> None:
        """Before every step."""

    def note(self, output: Output) -> bool:
        """Whether the output is the request's own, and not of what was done to it here."""
        ...


class AtOnce:
    """Hands requests over as they come: the engine says who waits."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def add(self, request: AddRequest) -> None:
        self._engine.add(request)

    def settle(self) -> None: ...

    def note(self, output: Output) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Driven:
    """What became of a load. ``is_cut``: its time was up before it was done."""

    courses: tuple[Course, ...]
    total_s: float
    is_cut: bool


def drive(
    engine: Engine,
    watched: Watched,
    requests: Sequence[AddRequest],
    *,
    arrivals_s: Sequence[float],
    front: Front,
    limit_s: float = math.inf,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Driven:
    """Run a load to its end, or for ``limit_s``: what is left then is aborted."""
    courses = {r.request_id: Course(at_s) for r, at_s in zip(requests, arrivals_s, strict=True)}
    coming = list(zip(arrivals_s, requests, strict=True))[::-1]
    watched.started_s.clear()
    began_s = clock()
    while (coming or front.has_work) and clock() - began_s < limit_s:
        while coming and coming[-1][0] <= clock() - began_s:
            front.add(coming.pop()[1])
        front.settle()
        if not front.has_work:
            sleep(max(0.0, coming[-1][0] - (clock() - began_s)))
            continue
        outputs = engine.step().outputs
        now_s = clock() - began_s
        for output in outputs:
            if front.note(output):
                _record(courses[output.request_id], output, now_s)
    total_s = clock() - began_s
    for request in requests:
        course = courses[request.request_id]
        started_s = watched.started_s.get(request.prompt_tokens[0])
        course.started_s = None if started_s is None else started_s - began_s
    is_cut = not all(course.is_over for course in courses.values())
    _empty(engine, requests)
    return Driven(courses=tuple(courses.values()), total_s=total_s, is_cut=is_cut)


def _record(course: Course, output: Output, now_s: float) -> None:
    if output.token_id is not None:
        course.tokens_s.append(now_s)
    course.error = output.error or course.error
    course.is_over |= output.finish_reason is not None


def _empty(engine: Engine, requests: Sequence[AddRequest]) -> None:
    """Nothing of them stays in the engine."""
    for request in requests:
        engine.abort(request.request_id)
    while engine.has_work:
        engine.step()


def make_requests(load: Load, prompts: Prompts, *, is_sparse: bool = True) -> list[AddRequest]:
    mode = SparseMode.AUTO if is_sparse else SparseMode.OFF
    return [
        AddRequest(
            request_id=str(number),
            prompt_tokens=prompts.make(number, load.prompt_tokens),
            sampling=SamplingParams(max_tokens=load.output_tokens, temperature=0.0),
            sparse=SparseOptions(mode=mode),
        )
        for number in range(load.count)
    ]


def summarise(driven: Driven) -> Mapping[str, Any]:
    """Figures of a load: seconds, and milliseconds a token. Of requests that were refused there are
    none; of others that did not come so far, waits and first tokens count up to the end."""
    served = [course for course in driven.courses if course.error is None]
    come = [course for course in served if course.arrived_s <= driven.total_s]
    end_s = driven.total_s
    ttft_s = [(c.tokens_s[0] if c.tokens_s else end_s) - c.arrived_s for c in come]
    delay_s = [(end_s if c.started_s is None else c.started_s) - c.arrived_s for c in come]
    spans = [c.tokens_s for c in served if len(c.tokens_s) > 1]
    tpot_ms = [1e3 * (seen[-1] - seen[0]) / (len(seen) - 1) for seen in spans]
    gaps_ms = [1e3 * float(gap) for seen in spans for gap in np.diff(seen)]
    num_tokens = sum(len(course.tokens_s) for course in driven.courses)
    return {
        "requests": len(driven.courses),
        "finished": sum(course.is_over for course in served),
        "refused": len(driven.courses) - len(served),
        "is_cut": driven.is_cut,
        "total_s": end_s,
        "output_tokens": num_tokens,
        "output_tokens_per_s": num_tokens / end_s,
        "mean_ttft_s": _mean(ttft_s),
        "p99_ttft_s": p99(ttft_s),
        "mean_tpot_ms": _mean(tpot_ms),
        "p99_tpot_ms": p99(tpot_ms),
        "p99_gap_ms": p99(gaps_ms),
        "mean_delay_s": _mean(delay_s),
    }


def p99(values: Sequence[float]) -> float | None:
    """The least of the values that 99 of 100 do not exceed."""
    return float(np.percentile(values, 99, method="inverted_cdf")) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
