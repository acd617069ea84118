"""What may be proposed: each guard a function of its own, values in, values out."""

from __future__ import annotations

from collections.abc import Mapping

from sparsed.core import KNOBS_BY_NAME, Knobs, KnobValue
from sparsed.tuner.space import SearchSpace


def guard(
    values: Mapping[str, KnobValue], *, current: Knobs, space: SearchSpace, max_rungs: int = 1
) -> dict[str, KnobValue]:
    """The closest change to ``values`` that is allowed from ``current``; InputError never comes
    out of applying it. Only knobs that differ from ``current`` are returned."""
    limited = limit_step(clip(values, space=space), current=current, space=space, rungs=max_rungs)
    repaired = repair(limited, current=current)
    current.with_values(repaired)
    return {name: value for name, value in repaired.items() if value != getattr(current, name)}


def clip(values: Mapping[str, KnobValue], *, space: SearchSpace) -> dict[str, KnobValue]:
    """Numbers within the ends of their ladders; knobs without a ladder are dropped."""
    clipped: dict[str, KnobValue] = {}
    for ladder in space.ladders:
        value = values.get(ladder.name)
        if isinstance(value, int | float):
            bounded = min(max(value, ladder.rungs[0]), ladder.rungs[-1])
            is_whole = KNOBS_BY_NAME[ladder.name].integer
            clipped[ladder.name] = int(bounded) if is_whole else bounded
        elif ladder.name in values:
            clipped[ladder.name] = value
    return clipped


def limit_step(
    values: Mapping[str, KnobValue], *, current: Knobs, space: SearchSpace, rungs: int
) -> dict[str, KnobValue]:
    """At most ``rungs`` rungs away from the current value, knob by knob."""
    limited = dict(values)
    for ladder in space.ladders:
        if ladder.name not in values:
            continue
        here = ladder.nearest(getattr(current, ladder.name))
        there = ladder.nearest(values[ladder.name])
        if abs(there - here) > rungs:
            limited[ladder.name] = ladder.value(here + (rungs if there > here else -rungs))
    return limited


def repair(values: Mapping[str, KnobValue], *, current: Knobs) -> dict[str, KnobValue]:
    """Constraints between knobs: four pages fit the token budget, the token budget fits the hot
    budget, active sequences fit the capacity."""
    repaired = dict(values)

    def number(name: str) -> int | None:
        value = repaired.get(name, getattr(current, name))
        return None if value is None else int(value)

    token_budget, page_size = number("token_budget"), number("page_size")
    assert token_budget is not None and page_size is not None
    if token_budget < 4 * page_size:
        repaired["token_budget"] = token_budget = 4 * page_size
    hbm_budget = number("hbm_budget")
    if hbm_budget is not None and hbm_budget < token_budget:
        repaired["hbm_budget"] = token_budget
    active = number("max_num_active_seqs")
    if active is not None and active > current.max_num_seqs:
        repaired["max_num_active_seqs"] = current.max_num_seqs
    return repaired
