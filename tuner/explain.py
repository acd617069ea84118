"""A verdict in words."""

from __future__ import annotations

import math
from typing import Final

from sparsed.core import AcceptanceRule, AcceptanceVerdict, DecisionReason, Guard
from sparsed.tuner.acceptance import WORSE

GUARD_WORDS: Final = {
    Guard.TTFT: "TTFT p95",
    Guard.TPOT: "TPOT p95",
    Guard.ERRORS: "the error rate",
    Guard.QUALITY: "attention recall",
}
GUARD_OF: Final = {reason: guard for guard, reason in WORSE.items()}


def explain(verdict: AcceptanceVerdict, *, rule: AcceptanceRule) -> str:
    """One sentence: what was decided, by which figure, and what would change it."""
    reason = verdict.reason
    if guard := GUARD_OF.get(reason):
        most = rule.max_error_frac if guard is Guard.ERRORS else rule.max_loss_frac
        return (
            f"rejected: {GUARD_WORDS[guard]} may be {_percent(verdict.loss_bounds[guard])} worse, "
            f"over the {most:.1%} allowed"
        )
    if verdict.hl is None or verdict.p is None or verdict.cv is None:
        return _without_statistics(verdict, rule=rule)
    gain = f"{_percent(verdict.hl)} in {verdict.num_pairs} pairs, p {verdict.p:.3g}"
    return {
        DecisionReason.ACCEPTED: f"accepted: {gain}",
        DecisionReason.NO_GAIN: f"rejected: {gain} is no gain at {rule.alpha:g}",
        DecisionReason.SMALL_EFFECT: f"rejected: {gain}, too small: {rule.min_effect_frac:.1%} "
        "is the least",
        DecisionReason.NOISY: f"held: one window varies by {verdict.cv:.1%}, more than "
        f"{rule.max_cv_frac:.1%}; measure longer windows on a quieter machine",
    }[reason]


def _without_statistics(verdict: AcceptanceVerdict, *, rule: AcceptanceRule) -> str:
    return {
        DecisionReason.OUTRANKED: "rejected: measured again in other arrival orders, its worst "
        "run is not above that of what ran before",
        DecisionReason.CANDIDATE_FAILED: "rejected: it broke down in the test",
        DecisionReason.MISSING_DATA: "held: a window has no figures",
        DecisionReason.NOT_ENOUGH: f"held: stopped after {verdict.num_pairs} of {rule.num_pairs} "
        "pairs; give it more time",
    }[verdict.reason]


def _percent(log_ratio: float) -> str:
    return f"{math.expm1(log_ratio):+.1%}"
