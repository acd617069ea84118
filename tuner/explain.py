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
MAX_FACTOR: Final = 10.0  # more is of targets that were missed before, and tells of no speed
GUARD_OF: Final = {reason: guard for guard, reason in WORSE.items()}


def explain(verdict: AcceptanceVerdict, *, rule: AcceptanceRule) -> str:
    """One sentence: what was decided, by which figure, and what would change it. Figures that
    a stored verdict has lost are shown as such."""
    if guard := GUARD_OF.get(verdict.reason):
        most = rule.max_error_frac if guard is Guard.ERRORS else rule.max_loss_frac
        bound = in_percent(verdict.loss_bounds.get(guard))
        return f"rejected: {GUARD_WORDS[guard]} may be {bound} worse, over the {most:.1%} allowed"
    if verdict.reason is DecisionReason.METRIC_WORSE:
        bound = in_percent(verdict.loss_bounds.get(rule.metric))
        return f"rejected: {rule.metric} may be {bound} worse, over the {rule.max_loss_frac:.1%} allowed"
    p = "-" if verdict.p is None else f"{verdict.p:.3g}"
    noise = "-" if verdict.cv is None else f"{verdict.cv:.1%}"
    gain = f"{in_percent(verdict.hl)} in {verdict.num_pairs} pairs, p {p}"
    return {
        DecisionReason.ACCEPTED: f"accepted{'' if rule.needs_gain else ', as no worse'}: {gain}",
        DecisionReason.OUTRANKED: "rejected: measured again in other arrival orders, its worst "
        "run is not above that of what ran before",
        DecisionReason.CANDIDATE_FAILED: "rejected: it broke down in the test",
        DecisionReason.NO_GAIN: f"rejected: {gain} is no gain at {rule.alpha:g}",
        DecisionReason.SMALL_EFFECT: f"rejected: {gain}, too small: {rule.min_effect_frac:.1%} "
        "is the least",
        DecisionReason.MISSING_DATA: "held: a window or a figure of one is missing",
        DecisionReason.NOT_ENOUGH: f"held: stopped after {verdict.num_pairs} of {rule.num_pairs} "
        "pairs; give it more time",
        DecisionReason.NOISY: f"held: one window varies by {noise}, more than "
        f"{rule.max_cv_frac:.1%}, and the gain may be less than that; measure longer windows on a quieter machine",
    }[verdict.reason]


def in_percent(log_ratio: float | None) -> str:
    """A gain or a loss, given as the logarithm of a ratio."""
    if log_ratio is not None and log_ratio > math.log(MAX_FACTOR):
        return f"over {MAX_FACTOR:g}x"
    return "-" if log_ratio is None else f"{math.expm1(log_ratio):+.1%}"
