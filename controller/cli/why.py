"""``sparsed why``: what binds now, what would help, what was tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sparsed.controller.cli.output import (
    Output,
    OutputOption,
    print_json,
    print_table,
    utc,
    values_in_words,
)
from sparsed.controller.cli.session import StateDirOption, connect

if TYPE_CHECKING:
    from sparsed.controller.control import Explanation
    from sparsed.core import Evidence, KnobValue, Remedy, Verdict


def why(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show what binds the running daemon now, with the numbers that say so, what would help, and
    what was advised and tried before.

    What would help is a direction, not a prediction: sparsed tune measures what a change brings.
    """
    with connect(state_dir) as client:
        found = client.explain()
    if output is Output.JSON:
        print_json(found)
        return
    print(_headline(found.verdict))
    print_table(("evidence", ""), [(item.name, _number(item)) for item in found.verdict.evidence])
    if found.verdict.left_out:
        print("left out: " + "; ".join(found.verdict.left_out))
    print_table(
        ("would help", "", "why"),
        [(item.knob or "beyond knobs", _direction(item), item.why) for item in found.remedies],
    )
    for line in _history(found):
        print(line)


def _headline(verdict: Verdict) -> str:
    age = (
        ""
        if verdict.age_s is None
        else f" ({verdict.num_windows} windows, {verdict.age_s:.1f} s old)"
    )
    return f"{verdict.bound.value}: {verdict.reason}{age}"


def _number(item: Evidence) -> str:
    if item.unit == "share":
        return f"{100 * item.value:.0f} %"
    if item.unit == "s":
        return f"{1e3 * item.value:.1f} ms"
    return f"{item.value:.4g} {item.unit}"


def _direction(remedy: Remedy) -> str:
    if remedy.up is None:
        return ""
    return "raise" if remedy.up else "lower"


def _history(found: Explanation) -> Iterator[str]:
    if not found.tried and not found.rollouts:
        yield "tried: nothing was put to the test here yet; see: sparsed tune"
    for change in found.tried:
        yield f"tried {utc(change.decided_at)}: {_sorted(change.values)}: {change.words}"
    for record in found.rollouts:
        became = f"{record.state.value}, {record.reason.value}"
        yield f"live {utc(record.at)}: {_sorted(record.config_to)}: {became}"
    for advice in found.advised:
        yield f"advised: {_sorted(advice.values) or 'hold'}: {advice.reason}"


def _sorted(values: Mapping[str, KnobValue]) -> str:
    """In words, by name: on the wire they have no order."""
    return values_in_words(dict(sorted(values.items())))
