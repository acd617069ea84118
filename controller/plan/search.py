"""Which configuration to take: all that are worth a look, judged by the targets, the best kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sparsed.controller.plan.forecast import Configuration, Forecast, Place, Traffic
from sparsed.core import (
    KNOBS_BY_NAME,
    ExitCode,
    InputError,
    KnobValue,
    SparseMethod,
    StartError,
)

CHUNKS: Final = (512, 1024, 2048, 4096, 8192)
MIN_GAIN: Final = 0.01  # or the default is kept
METHODS: Final = (SparseMethod.DENSE.value, str(KNOBS_BY_NAME["sparse_method"].default))


class Verdict(StrEnum):
    OK = "OK"
    SLO_INFEASIBLE = "SLO_INFEASIBLE"  # no configuration meets the targets
    RATE_INFEASIBLE = "RATE_INFEASIBLE"  # none keeps up with the arrivals
    MEMORY_INFEASIBLE = "MEMORY_INFEASIBLE"  # not one request fits


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """``best`` of all; ``by_method``: of each, for comparison. ``why``: what the verdict rests on,
    the closest point and what binds it where it is not OK. ``lacks``: how far above its target the
    worst figure is, as a share of the target; 0 if all are met. A rate that is too high lacks its
    ratio to the one that can be served, so that it weighs more than any late token."""

    verdict: Verdict
    best: Forecast | None
    by_method: Mapping[str, Forecast]
    why: str
    lacks: float = 0.0


def choose(place: Place, traffic: Traffic, *, asked: Mapping[str, KnobValue]) -> Choice:
    """The configuration with the most output tokens per second of those that meet the targets;
    if none does, the one that is closest. Targets are never relaxed.

    ``asked``: knobs that are not to be changed. Errors: InputError of the planner where no method
    fits the memory that was asked for.
    """
    found: dict[str, list[Forecast]] = {}
    error: InputError | StartError | None = None
    for name in [str(asked["sparse_method"])] if "sparse_method" in asked else METHODS:
        try:
            found[name] = list(_forecasts(place, traffic, asked={**asked, "sparse_method": name}))
        except (InputError, StartError) as raised:
            error = error or raised
    if not found and error is not None:
        raise error
    best = {name: _best(options, traffic) for name, options in found.items() if options}
    if not best:
        return Choice(
            verdict=Verdict.MEMORY_INFEASIBLE,
            best=None,
            by_method={},
            why=f"not one request of {traffic.request_tokens:,} tokens fits: raise kv_hbm_gib or "
            "kv_dram_gib, lower --context, or let attention be sparse",
        )
    winner = min(best.values(), key=lambda item: (lacks(item, traffic), -_rate(item)))
    return _judged(winner, best, traffic)


def lacks(forecast: Forecast, traffic: Traffic) -> float:
    """How far the worst figure is above its target, as a share of it; 0: all are met."""
    slo, service = traffic.slo, forecast.service
    excess = [0.0]
    if traffic.rate_per_s is not None and not forecast.keeps_up:
        excess.append(traffic.rate_per_s / forecast.most.requests_per_s)
    if slo.ttft_s is not None:
        excess.append(service.ttft_s / slo.ttft_s - 1)
    if slo.tpot_s is not None:
        excess.append(service.tpot_s / slo.tpot_s - 1)
    return max(excess)


def _forecasts(
    place: Place, traffic: Traffic, *, asked: Mapping[str, KnobValue]
) -> Iterator[Forecast]:
    chunk = asked.get("prefill_chunk")
    for tokens in [int(chunk)] if chunk is not None else CHUNKS:
        config = Configuration(place, traffic, asked={**asked, "prefill_chunk": tokens})
        options = [config.forecast(number) for number in range(1, config.limits.at_once + 1)]
        if options and traffic.rate_per_s is not None:
            yield max(options, key=_rate)
        else:
            yield from options


def _best(options: list[Forecast], traffic: Traffic) -> Forecast:
    """The fastest that meets the targets, the default chunk if that is within ``MIN_GAIN``."""
    fastest = min(options, key=lambda item: (lacks(item, traffic), -_rate(item)))
    usual = [
        item
        for item in options
        if item.knobs.prefill_chunk == KNOBS_BY_NAME["prefill_chunk"].default
    ]
    for item in sorted(usual, key=_rate, reverse=True):
        same = lacks(item, traffic) <= lacks(fastest, traffic)
        if same and _rate(item) >= (1 - MIN_GAIN) * _rate(fastest):
            return item
    return fastest


def _rate(forecast: Forecast) -> float:
    return forecast.most.output_tokens_per_s


def _judged(best: Forecast, by_method: Mapping[str, Forecast], traffic: Traffic) -> Choice:
    excess = lacks(best, traffic)
    verdict = Verdict.OK
    why = "no target given"
    if traffic.slo.ttft_s is not None or traffic.slo.tpot_s is not None:
        why = "every target is met"
    if traffic.rate_per_s is not None and not best.keeps_up:
        verdict = Verdict.RATE_INFEASIBLE
        why = (
            f"{traffic.rate_per_s:g} requests/s are more than the {best.most.requests_per_s:.3g} "
            f"that this configuration serves with {best.most.requests} at once; {best.bound}"
        )
    elif excess > 0:
        verdict = Verdict.SLO_INFEASIBLE
        why = f"the closest point is {excess:.0%} over: {_worst(best, traffic)}; {best.bound}"
    return Choice(verdict=verdict, best=best, by_method=by_method, why=why, lacks=excess)


def _worst(best: Forecast, traffic: Traffic) -> str:
    slo, service = traffic.slo, best.service
    told = []
    if slo.ttft_s is not None:
        told.append(
            (service.ttft_s / slo.ttft_s, f"TTFT {service.ttft_s:.3g} s for {slo.ttft_s:g}")
        )
    if slo.tpot_s is not None:
        told.append(
            (
                service.tpot_s / slo.tpot_s,
                f"TPOT {service.tpot_s * 1e3:.3g} ms for {slo.tpot_s * 1e3:g}",
            )
        )
    return max(told)[1]


def exit_code(choice: Choice) -> ExitCode:
    """69 where nothing serves what was asked for."""
    return ExitCode.OK if choice.verdict is Verdict.OK else ExitCode.UNAVAILABLE
