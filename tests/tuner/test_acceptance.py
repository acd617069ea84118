"""Verdicts: symmetric, blind to the order of pairs, and on hold where something is missing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import (
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    DecisionReason,
    DecisionState,
    Guard,
    InputError,
    TrialStatus,
    WindowStage,
)
from sparsed.tuner.acceptance import agree, decide, worst_of
from sparsed.tuner.explain import explain

RULE = AcceptanceRule()
A, B, C = ({"token_budget": budget} for budget in (1024, 2048, 4096))
BETTER = 1.1
gains = st.lists(st.floats(0.8, 1.25), min_size=32, max_size=32)


def window(number: int, values: dict[str, int], **metrics: float | None) -> AcceptanceWindow:
    figures = {RULE.metric: 10.0, Guard.TTFT.value: 0.5, Guard.TPOT.value: 0.02}
    figures |= {Guard.ERRORS.value: 0.0, Guard.QUALITY.value: 0.95}
    return AcceptanceWindow(
        number=number,
        stage=WindowStage.TEST,
        round=number // 2,
        order=number // 2,
        values=values,
        status=TrialStatus.OK,
        metrics=figures | metrics,
    )


def pairs(ratios: Sequence[float], **candidate: float | None) -> list[AcceptanceWindow]:
    """Windows whose goodput has these ratios; ``candidate`` are other figures of its side."""
    found = []
    for number, ratio in enumerate(ratios):
        found.append(window(2 * number, A))
        goodput = {RULE.metric: 10.0 * ratio}
        found.append(window(2 * number + 1, B, **(goodput | candidate)))
    return found


def noisy(gain: float, *, num_pairs: int = 32, seed: int = 0, sd: float = 0.03) -> list[float]:
    draw = random.Random(seed)
    return [gain * math.exp(draw.gauss(0.0, sd)) for _ in range(num_pairs)]


def verdict_on(
    windows: Sequence[AcceptanceWindow], rule: AcceptanceRule = RULE
) -> AcceptanceVerdict:
    return decide(windows, rule=rule, config_from=A, config_to=B)


def test_a_clear_gain_is_accepted_with_its_figures() -> None:
    verdict = verdict_on(pairs(noisy(BETTER)))
    assert (verdict.state, verdict.reason) == (DecisionState.ACCEPTED, DecisionReason.ACCEPTED)
    assert verdict.hl is not None and verdict.ci_lo is not None and verdict.ci_hi is not None
    assert 0.0 < verdict.ci_lo < verdict.hl < verdict.ci_hi
    assert math.log(BETTER) == pytest.approx(verdict.hl, abs=0.02)
    assert verdict.p is not None and verdict.p < RULE.alpha
    assert verdict.cv == pytest.approx(0.03 / math.sqrt(2), rel=0.4)
    assert verdict.loss_bounds == dict.fromkeys(verdict.loss_bounds, 0.0)
    assert set(verdict.loss_bounds) == {guard.value for guard in Guard}


@given(gains, st.randoms(use_true_random=False))
def test_the_order_of_pairs_and_of_windows_does_not_matter(
    ratios: list[float], draw: random.Random
) -> None:
    windows = pairs(ratios)
    shuffled = list(range(32))
    draw.shuffle(shuffled)
    renumbered = [replace(item, round=shuffled[item.round]) for item in windows]
    draw.shuffle(renumbered)
    assert agree(verdict_on(windows), verdict_on(renumbered))


@given(gains)
def test_exchanging_the_sides_negates_every_figure(ratios: list[float]) -> None:
    windows = pairs(ratios)
    there = verdict_on(windows)
    back = decide(windows, rule=RULE, config_from=B, config_to=A)
    assert there.hl is not None and there.ci_lo is not None and there.cv is not None
    assert back.hl == pytest.approx(-there.hl, abs=1e-12)
    assert back.ci_hi == pytest.approx(-there.ci_lo, abs=1e-12)
    assert back.cv == pytest.approx(there.cv, abs=1e-12)
    assert {there.state, back.state} != {DecisionState.ACCEPTED}


def test_nothing_is_computed_before_the_last_pair() -> None:
    windows = pairs(noisy(2.0))
    for kept in (0, 1, 10, 62, 63):
        verdict = verdict_on(windows[:kept])
        assert (verdict.reason, verdict.num_pairs) == (DecisionReason.NOT_ENOUGH, kept // 2)
        assert verdict.state is DecisionState.HELD
        assert (verdict.hl, verdict.p, verdict.cv, verdict.loss_bounds) == (None, None, None, {})
    assert verdict_on(windows).state is DecisionState.ACCEPTED


def test_windows_after_the_last_pair_change_nothing() -> None:
    windows = pairs(noisy(BETTER))
    more = [*windows, *(replace(item, round=item.round + 32) for item in pairs([0.5] * 8))]
    assert verdict_on(more) == verdict_on(windows)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", [RULE.metric, *Guard])
@pytest.mark.parametrize("at", [0, 63])
def test_a_figure_that_is_none_holds(value: float | None, name: str, at: int) -> None:
    windows = pairs(noisy(BETTER))
    windows[at] = replace(windows[at], metrics={**windows[at].metrics, name: value})
    verdict = verdict_on(windows)
    assert (verdict.state, verdict.reason) == (DecisionState.HELD, DecisionReason.MISSING_DATA)
    assert verdict.p is None


def test_only_guarded_figures_have_to_be_there() -> None:
    windows = pairs(noisy(BETTER), ttft_p95_s=None)
    guards = tuple(guard for guard in Guard if guard is not Guard.TTFT)
    assert verdict_on(windows).reason is DecisionReason.MISSING_DATA
    assert verdict_on(windows, replace(RULE, guards=guards)).reason is DecisionReason.ACCEPTED


@pytest.mark.parametrize(
    "spoil",
    [
        lambda windows: windows[:5] + windows[6:],  # one window is absent
        lambda windows: [*windows, replace(windows[7], number=99)],  # one came twice
        lambda windows: [*windows, replace(windows[63], number=99)],  # the last one did
        lambda windows: windows[2:],  # the first pair is absent
    ],
)
def test_an_absent_or_doubled_window_holds(
    spoil: Callable[[list[AcceptanceWindow]], list[AcceptanceWindow]],
) -> None:
    assert verdict_on(spoil(pairs(noisy(BETTER)))).reason is DecisionReason.MISSING_DATA


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        (noisy(1.0), DecisionReason.NO_GAIN),
        (noisy(1 / BETTER), DecisionReason.NO_GAIN),
        ([1.0] * 32, DecisionReason.NO_GAIN),
        ([0.0] * 32, DecisionReason.NO_GAIN),
        (noisy(1.005, sd=0.001), DecisionReason.SMALL_EFFECT),
        (noisy(1.15, sd=0.2), DecisionReason.NOISY),
        (noisy(1 / 1.5, sd=0.2), DecisionReason.NOISY),
        (noisy(1.5, sd=0.2), DecisionReason.ACCEPTED),
    ],
)
def test_reasons_of_the_gain(ratios: list[float], reason: DecisionReason) -> None:
    verdict = verdict_on(pairs(ratios))
    assert verdict.reason is reason
    assert verdict.p is not None


def test_a_guard_that_noise_blurs_holds_a_sure_gain() -> None:
    """It is not rejected for what nobody can tell."""
    draw = random.Random(2)
    blurred = [
        replace(
            item,
            metrics=item.metrics | {"ttft_p95_s": 0.1 * math.exp(draw.gauss(0.0, 0.3))},
        )
        for item in pairs(noisy(2.6, sd=0.2))
    ]
    assert verdict_on(blurred).reason is DecisionReason.NOISY


def test_the_gain_must_be_significant_at_the_level_of_the_rule() -> None:
    weak = [pairs(noisy(1.011, seed=seed)) for seed in range(40)]
    between = [item for item in weak if 0.025 < (verdict_on(item).p or 0.0) < 0.05]
    assert between
    for windows in between:
        assert verdict_on(windows).reason is DecisionReason.NO_GAIN
        assert verdict_on(windows, replace(RULE, alpha=0.05)).reason is not DecisionReason.NO_GAIN


def test_the_noise_is_the_deviation_of_one_window() -> None:
    quantiles = [NormalDist(0.0, 0.05).inv_cdf((at + 0.5) / 32) for at in range(32)]
    verdict = verdict_on(pairs([BETTER * math.exp(value) for value in quantiles]))
    assert verdict.cv == pytest.approx(0.05 / math.sqrt(2), rel=0.05)


def test_a_few_disturbed_windows_are_no_noise() -> None:
    ratios = noisy(BETTER)
    for at in (3, 11, 20):
        ratios[at] *= 0.5
    assert verdict_on(pairs(ratios)).reason is DecisionReason.ACCEPTED


@pytest.mark.parametrize(
    ("guard", "allowed", "too_bad", "reason"),
    [
        (Guard.TTFT, 0.5 * 1.02, 0.5 * 1.04, DecisionReason.TTFT_WORSE),
        (Guard.TPOT, 0.02 * 1.02, 0.02 * 1.04, DecisionReason.TPOT_WORSE),
        (Guard.QUALITY, 0.95 / 1.02, 0.95 / 1.04, DecisionReason.QUALITY_WORSE),
        (Guard.ERRORS, 0.002, 0.01, DecisionReason.ERRORS_WORSE),
    ],
)
def test_each_guard_has_its_margin(
    guard: Guard, allowed: float, too_bad: float, reason: DecisionReason
) -> None:
    ratios = noisy(BETTER)
    assert verdict_on(pairs(ratios, **{guard.value: allowed})).reason is DecisionReason.ACCEPTED
    verdict = verdict_on(pairs(ratios, **{guard.value: too_bad}))
    assert (verdict.state, verdict.reason) == (DecisionState.REJECTED, reason)
    assert "worse, over the" in explain(verdict, rule=RULE)


def test_below_its_target_a_latency_may_rise() -> None:
    windows = pairs(noisy(BETTER), tpot_p95_s=0.04)
    assert verdict_on(windows).reason is DecisionReason.TPOT_WORSE
    for target, reason in (
        (0.05, DecisionReason.ACCEPTED),
        (0.039, DecisionReason.ACCEPTED),
        (0.038, DecisionReason.TPOT_WORSE),
    ):
        rule = replace(RULE, targets={Guard.TPOT: target})
        assert verdict_on(windows, rule).reason is reason


@pytest.mark.parametrize(
    ("floor", "reason"),
    [
        (0.8, DecisionReason.ACCEPTED),
        (0.84, DecisionReason.ACCEPTED),
        (0.95, DecisionReason.QUALITY_WORSE),
        (None, DecisionReason.QUALITY_WORSE),
    ],
)
def test_over_its_floor_recall_may_fall(floor: float | None, reason: DecisionReason) -> None:
    windows = [
        replace(item, metrics={**item.metrics, "quality": 0.85 if item.values == B else 0.95})
        for item in pairs(noisy(BETTER))
    ]
    targets = {} if floor is None else {Guard.QUALITY: floor}
    assert verdict_on(windows, rule=replace(RULE, targets=targets)).reason is reason


def test_a_guard_that_is_only_uncertain_rejects_too() -> None:
    """Not worse on average, and yet a loss of 3 % is not excluded."""
    windows = pairs(noisy(BETTER))
    draw = random.Random(1)
    for at in range(1, 64, 2):
        ttft_s = 0.5 * math.exp(draw.gauss(0.0, 0.2))
        windows[at] = replace(windows[at], metrics={**windows[at].metrics, "ttft_p95_s": ttft_s})
    assert verdict_on(windows).reason is DecisionReason.TTFT_WORSE


def test_errors_in_few_windows_are_seen() -> None:
    """No ranks of 32 pairs show what happens in four of them."""
    windows = pairs(noisy(BETTER))
    for at in (1, 17, 33, 49):
        windows[at] = replace(windows[at], metrics={**windows[at].metrics, "error_frac": 0.05})
    assert verdict_on(windows).reason is DecisionReason.ERRORS_WORSE


def test_as_many_errors_on_both_sides_are_too_few_to_tell() -> None:
    windows = pairs(noisy(BETTER))
    for at in (1, 16, 33, 48):
        windows[at] = replace(windows[at], metrics={**windows[at].metrics, "error_frac": 0.05})
    verdict = verdict_on(windows)
    assert verdict.reason is DecisionReason.ERRORS_WORSE
    assert 0.005 < verdict.loss_bounds["error_frac"] < 0.006


def test_windows_that_break_a_target_are_worth_nothing() -> None:
    windows = [
        replace(item, status=TrialStatus.SLO_BROKEN) if item.values == A else item
        for item in pairs([0.5 * ratio for ratio in noisy(1.0)])
    ]
    verdict = verdict_on(windows)
    assert verdict.reason is DecisionReason.ACCEPTED  # slower, but within its targets
    assert verdict.hl is not None and verdict.hl > 1.0


@pytest.mark.parametrize(
    ("guard", "figures", "target", "reason"),
    [
        (Guard.TPOT, (0.2, 0.15), 0.1, DecisionReason.ACCEPTED),
        (Guard.TPOT, (0.2, 0.2), 0.1, DecisionReason.NO_GAIN),
        (Guard.QUALITY, (0.8, 0.85), 0.9, DecisionReason.ACCEPTED),
        (Guard.QUALITY, (0.8, 0.8), 0.9, DecisionReason.NO_GAIN),
        (Guard.QUALITY, (0.8, 0.7), 0.9, DecisionReason.NO_GAIN),
    ],
)
def test_of_two_that_miss_a_target_the_nearer_one_is_better(
    guard: Guard, figures: tuple[float, float], target: float, reason: DecisionReason
) -> None:
    is_low = guard is Guard.QUALITY
    status = TrialStatus.RECALL_BROKEN if is_low else TrialStatus.SLO_BROKEN
    windows = [
        replace(
            item,
            status=status,
            metrics={**item.metrics, guard.value: figures[item.values == B]},
        )
        for item in pairs([0.8 * ratio for ratio in noisy(1.0)])
    ]
    rule = replace(RULE, targets={guard: target})
    assert verdict_on(windows, rule=rule).reason is reason


@pytest.mark.parametrize("num_met", [0, 1, 4, 12, 16, 20, 31, 32])
def test_a_nearer_one_is_no_worse_for_meeting_its_target_now_and_then(num_met: int) -> None:
    windows = [
        replace(
            item,
            status=TrialStatus.SLO_BROKEN,
            metrics={**item.metrics, "tpot_p95_s": 0.15 if item.values == B else 0.2},
        )
        for item in pairs([0.8 * ratio for ratio in noisy(1.0)])
    ]
    for at in range(1, 2 * num_met, 2):
        met = {**windows[at].metrics, "tpot_p95_s": 0.09}
        windows[at] = replace(windows[at], status=TrialStatus.OK, metrics=met)
    rule = replace(RULE, targets={Guard.TPOT: 0.1})
    assert verdict_on(windows, rule=rule).reason is DecisionReason.ACCEPTED


def test_a_candidate_that_breaks_down_is_rejected_at_once() -> None:
    windows = pairs(noisy(BETTER))[:10]
    windows[-1] = replace(windows[-1], status=TrialStatus.OUT_OF_MEMORY, metrics={})
    verdict = verdict_on(windows)
    assert (verdict.state, verdict.reason) == (
        DecisionState.REJECTED,
        DecisionReason.CANDIDATE_FAILED,
    )
    incumbent = replace(windows[0], status=TrialStatus.OUT_OF_MEMORY, metrics={})
    assert verdict_on([incumbent]).reason is DecisionReason.MISSING_DATA


def ranking(scores: dict[str, list[float]]) -> list[AcceptanceWindow]:
    configs = {"A": A, "B": B, "C": C}
    return [
        replace(
            window(0, configs[name], **{RULE.metric: score}), stage=WindowStage.RANK, round=turn
        )
        for name, found in scores.items()
        for turn, score in enumerate(found)
    ]


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ({"A": [10, 10], "B": [12, 11], "C": [20, 9]}, DecisionReason.ACCEPTED),
        ({"A": [10, 10], "B": [30, 10], "C": [9, 9]}, DecisionReason.OUTRANKED),  # a tie
        ({"A": [10, 10], "B": [12, 11], "C": [12, 12]}, DecisionReason.OUTRANKED),
        ({"A": [10, 10], "B": [12, 0], "C": [1, 1]}, DecisionReason.OUTRANKED),
        ({"A": [10, 10], "B": [12, 11], "C": [1]}, DecisionReason.NOT_ENOUGH),
        ({"B": [12, 11]}, DecisionReason.NOT_ENOUGH),
    ],
)
def test_the_best_worst_round_goes_to_the_test(
    scores: dict[str, list[float]], reason: DecisionReason
) -> None:
    rule = replace(RULE, num_rounds=2)
    windows = [*ranking(scores), *pairs(noisy(BETTER))]
    assert verdict_on(windows, rule).reason is reason
    if "A" in scores:
        assert worst_of(windows, values=A, rule=rule) == min(scores["A"])


def test_a_rule_that_nothing_could_pass_is_refused() -> None:
    with pytest.raises(InputError, match="5 pairs: give more pairs") as caught:
        AcceptanceRule(num_pairs=5)
    assert caught.value.field == "alpha"
    assert AcceptanceRule(num_pairs=6).num_pairs == 6


@pytest.mark.parametrize("name", ["state", "reason", "num_pairs", "hl", "p", "loss_bounds"])
def test_verdicts_that_differ_do_not_agree(name: str) -> None:
    verdict = verdict_on(pairs(noisy(BETTER)))
    others: dict[str, Any] = {
        "state": DecisionState.REJECTED,
        "reason": DecisionReason.NO_GAIN,
        "num_pairs": 31,
        "hl": 0.2,
        "p": None,
        "loss_bounds": {**verdict.loss_bounds, "quality": 0.5},
    }
    assert agree(verdict, verdict)
    assert not agree(verdict, replace(verdict, **{name: others[name]}))


@pytest.mark.parametrize("reason", list(DecisionReason))
def test_every_reason_has_words(reason: DecisionReason) -> None:
    """Also of a stored verdict that lost its figures."""
    whole = replace(verdict_on(pairs(noisy(BETTER))), reason=reason)
    bare = AcceptanceVerdict(state=whole.state, reason=reason, num_pairs=3)
    for verdict in (whole, bare):
        words = explain(verdict, rule=RULE)
        assert words.partition(":")[0] in {"accepted", "rejected", "held"}


NO_HARM = AcceptanceRule(metric=RULE.metric, num_pairs=8, needs_gain=False)


@pytest.mark.parametrize(
    ("gain", "reason"),
    [
        (1.0, DecisionReason.ACCEPTED),
        (0.99, DecisionReason.ACCEPTED),
        (0.96, DecisionReason.METRIC_WORSE),
        (1.2, DecisionReason.ACCEPTED),
    ],
)
def test_where_no_gain_is_needed_it_must_be_shown_to_be_no_worse(
    gain: float, reason: DecisionReason
) -> None:
    verdict = verdict_on(pairs(noisy(gain, num_pairs=8, sd=0.01)), NO_HARM)
    assert verdict.reason is reason
    assert RULE.metric in verdict.loss_bounds
    words = explain(verdict, rule=NO_HARM)
    assert ("no worse" in words) is (reason is DecisionReason.ACCEPTED)


@pytest.mark.parametrize(
    ("rule", "gain", "low", "high"),
    [
        (NO_HARM, 0.97, 0.0, 0.06),
        (NO_HARM, 1.0, 0.25, 0.45),
        (NO_HARM, 1.03, 0.7, 0.88),
        (replace(NO_HARM, needs_gain=True), 1.03, 0.15, 0.33),
    ],
)
def test_eight_pairs_show_that_nothing_is_lost_not_that_much_is_won(
    rule: AcceptanceRule, gain: float, low: float, high: float
) -> None:
    sd = 0.04 * math.sqrt(2)  # of the logarithm of a ratio, at 4 % a window
    tests = [pairs(noisy(gain, num_pairs=8, seed=seed, sd=sd)) for seed in range(300)]
    passed = sum(verdict_on(test, rule).state is DecisionState.ACCEPTED for test in tests)
    assert low <= passed / len(tests) <= high


def test_guards_hold_where_no_gain_is_needed() -> None:
    windows = pairs(noisy(1.1, num_pairs=8, sd=0.01), **{Guard.TPOT.value: 0.03})
    assert verdict_on(windows, NO_HARM).reason is DecisionReason.TPOT_WORSE
    noise = pairs([0.8, 1.25] * 4)
    assert verdict_on(noise, NO_HARM).reason is DecisionReason.NOISY
