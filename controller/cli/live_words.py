"""What the live tuner of the running daemon may do with a knob, in words."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sparsed.core import KNOBS_BY_NAME, RECALL_KNOBS, KnobClass, Knobs, Slo
from sparsed.tuner.space import RESTART_KNOBS, live_space

NO_FLOOR: Final = (
    "leaves it alone: nothing says how much recall may be lost; start with --min-recall SHARE"
)


def live_words(name: str, *, knobs: Knobs, slo: Slo, pins: Collection[str]) -> str:
    """Whether the live tuner may change ``name``, and if not, why; ``pins``: names to leave alone,
    also those that the start was given."""
    if KNOBS_BY_NAME[name].klass is KnobClass.RESTART:
        searched = "; sparsed tune searches it" if name in RESTART_KNOBS else ""
        return f"leaves it alone: it changes at a restart{searched}"
    if name in RECALL_KNOBS and slo.min_recall is None:
        return NO_FLOOR
    if name in pins:
        return "leaves it alone: it is pinned, or was given to this start"
    if getattr(knobs, name) is None:
        return "leaves it on auto, by which the engine sets it"
    if name not in live_space(knobs, slo=slo).names:
        return "leaves it alone: it tests no other value of it"
    floor = (
        "" if slo.min_recall is None else f", with attention recall at {slo.min_recall:g} or more"
    )
    return f"may change it in mode auto{floor}"
