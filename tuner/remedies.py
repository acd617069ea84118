"""What would help where something binds: knobs by their guides, and what is beyond knobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sparsed.core import (
    KNOB_GUIDES,
    KNOBS_BY_NAME,
    PAGE_SIZES,
    Bound,
    KnobClass,
    KnobMove,
    Knobs,
    Remedy,
    SparseMethod,
    Verdict,
)

# Those that change nothing where every token is read.
SELECTION_KNOBS: Final = (
    "token_budget", "hbm_budget", "copy_programs", "retrieval_stride", "dense_layers",
)  # fmt: skip

BEYOND: Final[Mapping[Bound, str]] = {
    Bound.LINK: "a link of more lanes, or none of its traffic from other processes",
    Bound.HBM: "more requests at once, which share a reading of the weights, or faster memory",
    Bound.COMPUTE: "a faster device, or shorter prompts",
    Bound.LATENCY: "more requests at once: a step of few takes about as long",
    Bound.HOST: "cores that no other process uses",
    Bound.CAPACITY: "more memory where a tier is full, a second engine, or fewer requests at once",
    Bound.IDLE: "nothing: more requests can be sent",
    Bound.UNKNOWN: "traffic, and a few seconds of it: then ask again",
}


def remedies(verdict: Verdict, knobs: Knobs) -> tuple[Remedy, ...]:
    """Hot knobs first, then those of a restart, then what no knob does. A move that the range of
    the knob or the other knobs leave no room for is not among them. They are no predictions: what
    a change brings is measured, by ``sparsed tune``."""
    found = [
        (
            KNOBS_BY_NAME[name].klass is KnobClass.RESTART,
            Remedy(knob=name, up=move.up, why=move.why),
        )
        for name, guide in KNOB_GUIDES.items()
        for move in guide.moves
        if _applies(move, verdict) and _has_room(name, move, knobs)
    ]
    by_knob = [remedy for _, remedy in sorted(found, key=lambda item: item[0])]
    return (*by_knob, Remedy(knob=None, up=None, why=BEYOND[verdict.bound]))


def _applies(move: KnobMove, verdict: Verdict) -> bool:
    return move.bound is verdict.bound and move.limit in (None, verdict.limit)


def _has_room(name: str, move: KnobMove, knobs: Knobs) -> bool:
    value, spec = getattr(knobs, name), KNOBS_BY_NAME[name]
    is_unused = name in SELECTION_KNOBS and knobs.sparse_method == SparseMethod.DENSE
    if is_unused or value is None:  # auto moves by itself
        return False
    least, most = _limits(knobs).get(name, (spec.minimum, spec.maximum))
    edge = most if move.up else least
    return edge is None or (value < edge if move.up else value > edge)


def _limits(knobs: Knobs) -> Mapping[str, tuple[float, float | None]]:
    """Ranges that other knobs narrow, as ``Knobs`` checks them."""
    token_budget, page_size = KNOBS_BY_NAME["token_budget"], knobs.page_size
    fitting = [size for size in PAGE_SIZES if 4 * size <= knobs.token_budget]
    most_tokens = token_budget.maximum if knobs.hbm_budget is None else knobs.hbm_budget
    return {
        "token_budget": (max(token_budget.minimum or 0, 4 * page_size), most_tokens),
        "hbm_budget": (knobs.token_budget, KNOBS_BY_NAME["hbm_budget"].maximum),
        "max_num_active_seqs": (1, knobs.max_num_seqs),
        "retrieval_stride": (1, min(page_size, KNOBS_BY_NAME["retrieval_stride"].maximum or 1)),
        "page_size": (min(PAGE_SIZES), max(fitting)),
    }
