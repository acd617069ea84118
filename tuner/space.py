"""Which values of which knobs are worth trying."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from sparsed.core import (
    BLOCK_TOKENS,
    KNOBS_BY_NAME,
    RECALL_KNOBS,
    InputError,
    Knobs,
    KnobValue,
    Slo,
    SparseMethod,
    Workload,
)

MIN_PREFILL_CHUNK: Final = 128  # smaller chunks cost a step each and are never worth a trial
WATERMARKS: Final = (0.02, 0.05, 0.1, 0.2, 0.3)  # of the hot tier
PROGRAMS: Final = (2, 4, 8, 16, 32)  # that load; more than fill the link only slow other kernels
STRIDES: Final = (1, 2, 4, 8)  # steps, no more than the smallest page has tokens

RESTART_KNOBS: Final = frozenset({"page_size"})

Point = tuple[int, ...]  # one rung number per ladder


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """The values of one knob to try, ascending, about equal steps in the logarithm.

    ``auto_rung`` is the value that ``auto`` comes to on this machine: taking it means auto.
    """

    name: str
    rungs: tuple[float, ...]
    auto_rung: int | None = None

    def nearest(self, value: KnobValue) -> int:
        """Number of the rung closest to ``value`` in the logarithm."""
        number = self.auto_rung if value is None else value
        assert isinstance(number, int | float), f"{self.name}={value!r} is not on a ladder"
        return min(range(len(self.rungs)), key=lambda i: abs(math.log(self.rungs[i] / number)))

    def value(self, rung: int) -> KnobValue:
        return None if self.rungs[rung] == self.auto_rung else self.rungs[rung]


def anything(knobs: Knobs) -> bool:
    """Where nobody knows the machine."""
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """The ladders around ``default``; knobs without a ladder keep the default's value.
    ``is_planned``: whether an engine with such knobs could be started at all; whoever knows the
    machine tells."""

    default: Knobs
    ladders: tuple[Ladder, ...]
    is_planned: Callable[[Knobs], bool] = anything

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(ladder.name for ladder in self.ladders)

    @property
    def is_open(self) -> bool:
        """Whether there is anything to choose."""
        return any(len(ladder.rungs) > 1 for ladder in self.ladders)

    @property
    def default_values(self) -> dict[str, KnobValue]:
        return {name: getattr(self.default, name) for name in self.names}

    def encode(self, values: Mapping[str, KnobValue]) -> Point:
        """The nearest point; knobs that ``values`` lacks stand at the default."""
        complete = self.default_values | dict(values)
        return tuple(ladder.nearest(complete[ladder.name]) for ladder in self.ladders)

    def decode(self, point: Point) -> dict[str, KnobValue]:
        """Plain values, whatever integer type ``point`` holds."""
        pairs = zip(self.ladders, point, strict=True)
        return {ladder.name: ladder.value(int(rung)) for ladder, rung in pairs}

    def contains(self, point: Point) -> bool:
        """Whether every rung exists and the point is valid."""
        pairs = zip(self.ladders, point, strict=True)
        return all(0 <= rung < len(ladder.rungs) for ladder, rung in pairs) and self.is_valid(point)

    def is_valid(self, point: Point) -> bool:
        """Whether the knobs agree with each other and an engine could start with them."""
        try:
            knobs = self.default.with_values(self.decode(point))
        except InputError:
            return False
        return self.is_planned(knobs)

    def points(self) -> Iterator[Point]:
        """Every valid point."""
        grid = product(*(range(len(ladder.rungs)) for ladder in self.ladders))
        return (point for point in grid if self.is_valid(point))


def describe_space(
    space: SearchSpace, *, fixed: AbstractSet[str] = frozenset()
) -> dict[str, list[KnobValue]]:
    """Plain data that is equal for equal spaces: of each ladder the default and the rungs, of the
    other knobs the value. Capacities that the machine gives are left out, and the rungs of a
    ladder that has what auto comes to by them: free memory is never twice the same."""
    ladders: dict[str, list[KnobValue]] = {
        ladder.name: [
            getattr(space.default, ladder.name),
            *(ladder.rungs if ladder.auto_rung is None else ("auto",)),
        ]
        for ladder in space.ladders
    }
    others: dict[str, list[KnobValue]] = {
        name: [value]
        for name, value in space.default.as_dict().items()
        if name in fixed or KNOBS_BY_NAME[name].default is not None
    }
    return others | ladders


def build_space(
    default: Knobs,
    *,
    auto_hbm_budget: int,
    fixed: AbstractSet[str] = frozenset(),
    workload: Workload | None = None,
    hot_tokens: int | None = None,
    auto_copy_programs: int | None = None,
    is_planned: Callable[[Knobs], bool] = anything,
) -> SearchSpace:
    """The offline space: page size, both budgets, active sequences, prefill chunk, the watermark
    of residency where the workload is more than the hot tier keeps whole, and where the default
    selects the stride of retrieval and the programs that load what is missing.

    ``auto_hbm_budget``: tokens the closed form gives with ``default``. ``fixed``: knobs to leave
    alone. ``workload``: what trials run; a limit that it never reaches is not tried, for nothing
    would be learned of it. ``hot_tokens``: of whole requests that the hot tier has room for; None:
    not known, and the watermark stays. ``auto_copy_programs``: that the link's calibration gives to
    loads; None: no program loads, as on a CPU. ``is_planned``: as in ``SearchSpace``. Bounds are those of
    the knobs, cut to the model's length and the start-up capacity; the default is always on a rung.
    """
    longest = default.max_model_len
    caps = {
        "token_budget": longest,
        "hbm_budget": longest,
        "max_num_active_seqs": default.max_num_seqs,
        "prefill_chunk": longest,
    }
    ladders = [Ladder(name="page_size", rungs=_choices("page_size"))]
    for name, cap in caps.items():
        auto = auto_hbm_budget if name == "hbm_budget" else None
        ladders.append(_ladder(name, cap=cap, default=getattr(default, name), auto=auto))
    if workload is not None:
        ladders = [_within_reach(ladder, default=default, workload=workload) for ladder in ladders]
    if workload is not None and hot_tokens is not None:
        ladders += _watermarks(default, workload=workload, hot_tokens=hot_tokens)
    if workload is not None and _selects(default, workload):
        ladders.append(_stride(default))
        if auto_copy_programs is not None:
            ladders.append(_programs(default, auto=auto_copy_programs))
    free = (ladder for ladder in ladders if ladder.name not in fixed and len(ladder.rungs) > 1)
    return SearchSpace(default=default, ladders=tuple(free), is_planned=is_planned)


def _watermarks(default: Knobs, *, workload: Workload, hot_tokens: int) -> list[Ladder]:
    """None where the largest requests that may run at once are whole with the default's: a higher
    watermark would only take pages from them. None for dense attention either, which keeps all."""
    sizes = sorted(
        (_in_blocks(item.input_tokens + item.output_tokens) for item in workload.requests),
        reverse=True,
    )
    kept_tokens = (1.0 - default.residency_watermark) * hot_tokens
    is_dense = default.sparse_method == SparseMethod.DENSE
    if is_dense or sum(sizes[: default.max_num_seqs]) <= kept_tokens:
        return []
    return [_watermark(default)]


def _watermark(default: Knobs) -> Ladder:
    rungs = {*WATERMARKS, default.residency_watermark} - {0.0}  # of which there is no logarithm
    return Ladder(name="residency_watermark", rungs=tuple(sorted(rungs)))


def _selects(default: Knobs, workload: Workload) -> bool:
    """Whether any of its requests is longer than what the default reads of it."""
    longest = max(item.input_tokens + item.output_tokens for item in workload.requests)
    return default.sparse_method != SparseMethod.DENSE and longest > default.token_budget


def _stride(default: Knobs) -> Ladder:
    rungs = sorted({*STRIDES, default.retrieval_stride})
    return Ladder(name="retrieval_stride", rungs=tuple(rungs))


def _programs(default: Knobs, *, auto: int) -> Ladder:
    rungs = sorted({*PROGRAMS, auto, default.copy_programs or auto})
    return Ladder(name="copy_programs", rungs=tuple(rungs), auto_rung=auto)


def _in_blocks(num_tokens: int) -> int:
    """Tokens of the blocks that so many take."""
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def live_space(
    current: Knobs,
    *,
    slo: Slo,
    max_prefill_chunk: int | None = None,
    pins: AbstractSet[str] = frozenset(),
) -> SearchSpace:
    """Hot knobs only; a hot budget on auto is left to its closed form, a watermark of 0 is left
    alone, and so are ``RECALL_KNOBS`` where no floor of recall says what may be lost.
    ``max_prefill_chunk``: what memory has room for, None: any chunk. ``pins``: left alone too."""
    fixed = {*RESTART_KNOBS, *pins}
    if current.hbm_budget is None:
        fixed.add("hbm_budget")
    if slo.min_recall is None:
        fixed |= RECALL_KNOBS
    hbm_budget = current.hbm_budget or current.token_budget
    space = build_space(current, auto_hbm_budget=hbm_budget, fixed=fixed)
    most = largest_chunk(current, max_prefill_chunk)
    space = replace(space, ladders=tuple(_cut(one, most) for one in space.ladders))
    further = [_watermark(current)] if current.residency_watermark else []
    if current.sparse_method != SparseMethod.DENSE:
        further.append(_stride(current))
    free = (ladder for ladder in further if ladder.name not in fixed)
    return replace(space, ladders=(*space.ladders, *free))


def largest_chunk(current: Knobs, max_prefill_chunk: int | None) -> float:
    """Of prompts that may come into force, in tokens: what memory has room for, None: any; what is
    in force has its room."""
    return math.inf if max_prefill_chunk is None else max(max_prefill_chunk, current.prefill_chunk)


def _cut(ladder: Ladder, most: float) -> Ladder:
    """``ladder`` up to ``most``, if it is that of chunks."""
    if ladder.name != "prefill_chunk":
        return ladder
    return replace(ladder, rungs=tuple(rung for rung in ladder.rungs if rung <= most))


def _within_reach(ladder: Ladder, *, default: Knobs, workload: Workload) -> Ladder:
    """The rungs that limit ``workload`` and the default; where that one is a limit too, also the
    lowest rung that is none."""
    requests = workload.requests
    longest = max(request.input_tokens + request.output_tokens for request in requests)
    reached = {
        "max_num_active_seqs": len(requests),
        "token_budget": longest,
        "hbm_budget": longest,
        "prefill_chunk": sum(request.input_tokens for request in requests),
    }.get(ladder.name)
    if reached is None:
        return ladder
    standing = ladder.rungs[ladder.nearest(getattr(default, ladder.name))]
    limits = {rung for rung in ladder.rungs if rung < reached}
    free = set(list(ladder.rungs)[len(limits) : len(limits) + 1]) if standing in limits else set()
    return replace(ladder, rungs=tuple(sorted(limits | {standing} | free)))


def half_octaves(low: int, high: int) -> tuple[int, ...]:
    """Powers of two and one and a half times them, between ``low`` and ``high``."""
    powers = [1 << exponent for exponent in range(high.bit_length())]
    steps = {value for power in powers for value in (power, power + power // 2)}
    return tuple(sorted(value for value in steps if low <= value <= high))


def _choices(name: str) -> tuple[int, ...]:
    return tuple(sorted(int(choice) for choice in KNOBS_BY_NAME[name].choices))


def _ladder(name: str, *, cap: int, default: int | None, auto: int | None) -> Ladder:
    spec = KNOBS_BY_NAME[name]
    assert spec.minimum is not None and spec.maximum is not None
    low, high = int(spec.minimum), int(min(spec.maximum, cap))
    if name == "prefill_chunk":
        low = min(max(low, MIN_PREFILL_CHUNK), high)
    rungs = set(half_octaves(low, high)) | {value for value in (default, auto) if value}
    return Ladder(name=name, rungs=tuple(sorted(rungs)), auto_rung=auto)
