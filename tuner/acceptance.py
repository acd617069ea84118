"""Whether a change is accepted: a pure function of the rule and the windows.

The live canary and offline verification decide by it, and ``sparsed decision show`` decides again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import NormalDist, fmean, median, stdev
from typing import Final, NamedTuple

from sparsed.core import (
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    DecisionReason,
    DecisionState,
    Guard,
    KnobValue,
    TrialStatus,
    WindowStage,
)
from sparsed.tuner.signed_rank import hodges_lehmann, p_greater, upper_bound

BROKEN: Final = (
    TrialStatus.OUT_OF_MEMORY,
    TrialStatus.HOST_OUT_OF_MEMORY,
    TrialStatus.DEVICE_ERROR,
    TrialStatus.INVALID_CONFIG,
    TrialStatus.TIMEOUT,
    TrialStatus.ENGINE_ERROR,
)
WITHOUT_FIGURES: Final = (*BROKEN, TrialStatus.INTERRUPTED)  # the last one blames nobody
HELD: Final = (DecisionReason.MISSING_DATA, DecisionReason.NOT_ENOUGH, DecisionReason.NOISY)
WORSE: Final = {
    Guard.TTFT: DecisionReason.TTFT_WORSE,
    Guard.TPOT: DecisionReason.TPOT_WORSE,
    Guard.ERRORS: DecisionReason.ERRORS_WORSE,
    Guard.QUALITY: DecisionReason.QUALITY_WORSE,
}
LEAST_LOSS: Final = 1e-3  # of attention: a floor nearer to 1 cannot be told from 1
FLOOR_FRAC: Final = 1e-2  # of the largest value: what zero counts as, for it has no logarithm
BROKEN_FRAC: Final = 1e-2  # of the best: what a window is worth that just misses a target
SD_OF_MAD: Final = 1.4826  # of normal noise

Values = Mapping[str, KnobValue]


class _Pair(NamedTuple):
    incumbent: AcceptanceWindow
    candidate: AcceptanceWindow


def decide(
    windows: Sequence[AcceptanceWindow],
    *,
    rule: AcceptanceRule,
    config_from: Values,
    config_to: Values,
) -> AcceptanceVerdict:
    """The verdict on ``config_to`` taking the place of ``config_from``.

    Logarithms of the ratios within each pair; Wilcoxon's signed-rank test of the gain,
    Hodges-Lehmann estimate and interval; each guard must be shown to lose less than the rule
    allows. Nothing is computed before the last pair, so nobody can stop at a lucky one.
    """
    if fault := _ranking_fault(windows, rule=rule, config_from=config_from, config_to=config_to):
        return _without_statistics(fault)
    tested = [window for window in windows if window.stage is WindowStage.TEST]
    if any(window.status in BROKEN and window.values == config_to for window in tested):
        return _without_statistics(DecisionReason.CANDIDATE_FAILED)
    pairs = _pairs(tested, config_from=config_from, config_to=config_to)
    if pairs is None or any(_lacks_figures(window, rule) for window in tested):
        return _without_statistics(DecisionReason.MISSING_DATA)
    if len(pairs) < rule.num_pairs:
        return _without_statistics(DecisionReason.NOT_ENOUGH, num_pairs=len(pairs))
    return _test(pairs[: rule.num_pairs], rule=rule)


def worth(window: AcceptanceWindow, *, metric: str) -> float | None:
    """What counts of a window: nothing at all if it broke a target, None if it has no figure."""
    if window.status in BROKEN:
        return None
    return window.metrics.get(metric) if window.status is TrialStatus.OK else 0.0


def worst_of(
    windows: Sequence[AcceptanceWindow], *, values: Values, rule: AcceptanceRule
) -> float | None:
    """The least worth over all rounds of the ranking; None before the last one."""
    rounds = {
        window.round: worth(window, metric=rule.metric) or 0.0
        for window in windows
        if window.stage is WindowStage.RANK and window.values == values
    }
    return min(rounds.values()) if len(rounds) >= rule.num_rounds else None


def agree(first: AcceptanceVerdict, second: AcceptanceVerdict) -> bool:
    """Whether two verdicts are the same but for the last digits of their figures."""
    one, other = asdict(first), asdict(second)
    bounds, others = one.pop("loss_bounds"), other.pop("loss_bounds")
    return (
        bounds.keys() == others.keys()
        and all(_is_close(bounds[name], others[name]) for name in bounds)
        and all(_is_close(one[name], other[name]) for name in one)
    )


def _is_close(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return one == other


def _ranking_fault(
    windows: Sequence[AcceptanceWindow],
    *,
    rule: AcceptanceRule,
    config_from: Values,
    config_to: Values,
) -> DecisionReason | None:
    """Why the candidate may not be tested; None if its worst round is the best, or none is asked
    for."""
    if not rule.num_rounds:
        return None
    ranked = [window.values for window in windows if window.stage is WindowStage.RANK]
    worst = [worst_of(windows, values=values, rule=rule) for values in ranked]
    known = [value for value in worst if value is not None]
    candidate = worst_of(windows, values=config_to, rule=rule)
    incumbent = worst_of(windows, values=config_from, rule=rule)
    if len(known) < len(worst) or candidate is None or incumbent is None:
        return DecisionReason.NOT_ENOUGH
    beaten = candidate > incumbent and candidate >= max(known)
    return None if beaten else DecisionReason.OUTRANKED


def _pairs(
    tested: Sequence[AcceptanceWindow], *, config_from: Values, config_to: Values
) -> list[_Pair] | None:
    """By number; a last one that was cut off is left out. None if any other lacks a window, or
    one was measured twice."""
    sides: defaultdict[int, list[AcceptanceWindow]] = defaultdict(list)
    for window in tested:
        sides[window.round].append(window)
    pairs = []
    for number in range(max(sides, default=-1) + 1):
        incumbents = [window for window in sides[number] if window.values == config_from]
        candidates = [window for window in sides[number] if window.values == config_to]
        if len(incumbents) == len(candidates) == 1:
            pairs.append(_Pair(incumbents[0], candidates[0]))
        elif number < max(sides) or len(sides[number]) != 1:
            return None
    return pairs


def _lacks_figures(window: AcceptanceWindow, rule: AcceptanceRule) -> bool:
    figures = [worth(window, metric=rule.metric), *map(window.metrics.get, rule.guards)]
    return any(value is None or not 0 <= value < math.inf for value in figures)


def _test(pairs: Sequence[_Pair], *, rule: AcceptanceRule) -> AcceptanceVerdict:
    best = max(_figure(window, rule) for pair in pairs for window in pair)
    gains = _log_ratios(
        [_merit(pair.candidate, rule, best=best) for pair in pairs],
        [_merit(pair.incumbent, rule, best=best) for pair in pairs],
        floor_frac=BROKEN_FRAC * FLOOR_FRAC,
    )
    p, hl, cv = p_greater(gains), hodges_lehmann(gains), _noise(pairs, gains)
    bounds = {guard: _loss_bound(pairs, guard, rule=rule) for guard in rule.guards}
    loss = upper_bound([-gain for gain in gains], alpha=rule.guard_alpha)
    low = -upper_bound([-gain for gain in gains], alpha=rule.alpha)
    reason = _reason(p=p, hl=hl, loss=loss, bounds=bounds, rule=rule)
    is_sure = rule.takes_sure_gains and low > cv and reason is DecisionReason.ACCEPTED
    if cv > rule.max_cv_frac and not is_sure:
        reason = DecisionReason.NOISY
    return AcceptanceVerdict(
        state=_state(reason),
        reason=reason,
        num_pairs=len(pairs),
        hl=hl,
        ci_lo=low,
        ci_hi=upper_bound(gains, alpha=rule.alpha),
        p=p,
        cv=cv,
        loss_bounds={guard.value: bound for guard, bound in bounds.items()}
        | ({} if rule.needs_gain else {rule.metric: loss}),
    )


def _merit(window: AcceptanceWindow, rule: AcceptanceRule, *, best: float) -> float:
    """What counts of a window beside its partner. Of those that miss a target the nearest to it is
    worth most, at most ``BROKEN_FRAC`` of the best one, so that a repair may take several changes;
    one that misses none is worth no less. Under a floor of recall it is the share of attention that
    is lost that counts, over what may be."""
    if window.status is TrialStatus.OK:
        return max(_figure(window, rule), BROKEN_FRAC * best)
    excesses = [_excess(guard, window.metrics.get(guard), at) for guard, at in rule.targets.items()]
    return BROKEN_FRAC * best / max([1.0, *excesses])


def _excess(guard: Guard, figure: float | None, target: float) -> float:
    """How many times what its target allows; a recall that is unknown is no better than none."""
    if guard is Guard.QUALITY:
        return (1.0 - (figure or 0.0)) / max(1.0 - target, LEAST_LOSS)
    return (figure or 0.0) / target if target else 0.0


def _figure(window: AcceptanceWindow, rule: AcceptanceRule) -> float:
    return window.metrics.get(rule.metric) or 0.0


def _reason(
    *,
    p: float,
    hl: float,
    loss: float,
    bounds: Mapping[Guard, float],
    rule: AcceptanceRule,
) -> DecisionReason:
    if rule.needs_gain and p >= rule.alpha:
        return DecisionReason.NO_GAIN
    if rule.needs_gain and hl <= math.log1p(rule.min_effect_frac):
        return DecisionReason.SMALL_EFFECT
    if not rule.needs_gain and loss >= math.log1p(rule.max_loss_frac):
        return DecisionReason.METRIC_WORSE
    for guard, bound in bounds.items():
        is_errors = guard is Guard.ERRORS
        if bound >= math.log1p(rule.max_error_frac if is_errors else rule.max_loss_frac):
            return WORSE[guard]
    return DecisionReason.ACCEPTED


def _loss_bound(pairs: Sequence[_Pair], guard: Guard, *, rule: AcceptanceRule) -> float:
    """Upper limit of the logarithm of what the candidate loses in ``guard``."""
    alpha, target = rule.guard_alpha, rule.targets.get(guard)
    figures = [[side.metrics[guard] or 0.0 for side in sides] for sides in zip(*pairs, strict=True)]
    if target is not None:
        worst = min if guard is Guard.QUALITY else max
        figures = [[worst(figure, target) for figure in side] for side in figures]
    before, after = figures
    if guard is Guard.QUALITY:
        return upper_bound(_log_ratios(before, after), alpha=alpha)
    if guard is not Guard.ERRORS:
        return upper_bound(_log_ratios(after, before), alpha=alpha)
    # Errors are rare and come in few windows, which ranks do not see: their mean counts, and
    # their number is large enough for a normal limit.
    answered = [[1.0 - min(share, 1.0) for share in shares] for shares in (before, after)]
    losses = _log_ratios(*answered)
    return fmean(losses) + NormalDist().inv_cdf(1 - alpha) * stdev(losses) / math.sqrt(len(losses))


def _log_ratios(
    above: Sequence[float], below: Sequence[float], *, floor_frac: float = FLOOR_FRAC
) -> list[float]:
    floor = floor_frac * max(*above, *below) or 1.0
    pairs = zip(above, below, strict=True)
    return [math.log(max(one, floor)) - math.log(max(other, floor)) for one, other in pairs]


def _noise(pairs: Sequence[_Pair], gains: Sequence[float]) -> float:
    """Of one window, as a share: from the median absolute deviation, for the few windows that
    something else disturbed are noise that ranks bear. Pairs are compared with those in which the
    same sides met their targets: that a side met them is no noise, but what is to be found out."""
    alike: defaultdict[tuple[bool, ...], list[float]] = defaultdict(list)
    for pair, gain in zip(pairs, gains, strict=True):
        alike[tuple(side.status is TrialStatus.OK for side in pair)].append(gain)
    centred = [abs(gain - median(group)) for group in alike.values() for gain in group]
    return SD_OF_MAD * median(centred) / math.sqrt(2)


def _without_statistics(reason: DecisionReason, *, num_pairs: int = 0) -> AcceptanceVerdict:
    return AcceptanceVerdict(state=_state(reason), reason=reason, num_pairs=num_pairs)


def _state(reason: DecisionReason) -> DecisionState:
    if reason is DecisionReason.ACCEPTED:
        return DecisionState.ACCEPTED
    return DecisionState.HELD if reason in HELD else DecisionState.REJECTED
