"""``sparsed decision list|show``: what was put to the test, from the database itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sparsed.controller.cli.output import (
    Output,
    OutputOption,
    complain,
    print_json,
    print_table,
    utc,
    values_in_words,
)
from sparsed.controller.cli.session import ERROR, StateDirOption, find_state_dir
from sparsed.core import TrialStatus, WindowStage
from sparsed.tuner.acceptance import agree, decide
from sparsed.tuner.explain import explain, in_percent

if TYPE_CHECKING:
    from sparsed.core import AcceptanceDecision, AcceptanceVerdict, AcceptanceWindow
    from sparsed.db.store import Store

BROKEN: Final = (TrialStatus.SLO_BROKEN, TrialStatus.RECALL_BROKEN)

app = typer.Typer(
    help="Decisions on tuned configurations, with their evidence. Needs no daemon. The live "
    "tuner's advice is no decision: see tuner status.",
    no_args_is_help=True,
)


@app.command("list")
def list_(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show all decisions, newest first; as json with their windows."""
    with _store(state_dir) as store:
        decisions = () if store is None else store.list_acceptances()
    if output is Output.JSON:
        print_json(list(decisions))
        return
    if not decisions:
        print("no decisions")
        return
    print_table(
        ("id", "decided", "state", "reason", "gain", "p", "pairs", "model", "change"),
        (
            (
                decision.decision_id,
                utc(decision.decided_at),
                decision.verdict.state.value,
                decision.verdict.reason.value,
                in_percent(decision.verdict.hl),
                _number(decision.verdict.p),
                decision.verdict.num_pairs,
                decision.key.model,
                _change(decision),
            )
            for decision in decisions
        ),
    )


@app.command()
def show(
    decision_id: Annotated[int, typer.Argument(metavar="ID", help="As in: decision list.")],
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show one decision, and decide again from its stored windows.

    Exit status 1 if the stored verdict is not what its windows give.
    """
    with _store(state_dir) as store:
        if store is None:
            complain(f"no decision {decision_id}; there is no database yet")
            raise typer.Exit(ERROR)
        decision = store.find_acceptance(decision_id)
    again = decide(
        decision.windows,
        rule=decision.rule,
        config_from=decision.config_from,
        config_to=decision.config_to,
    )
    agrees = agree(decision.verdict, again)
    if output is Output.JSON:
        print_json({"decision": decision, "recomputed": again, "agrees": agrees})
    else:
        print_table(("decision", ""), _lines(decision, again=again, agrees=agrees))
    if not agrees:
        complain(f"the windows of decision {decision_id} do not give its stored verdict")
        raise typer.Exit(ERROR)


@contextmanager
def _store(state_dir: Path | None) -> Iterator[Store | None]:
    """None where nothing was ever stored: asking creates no database."""
    from sparsed.db import open_store

    place = find_state_dir(state_dir)
    if not place.database.exists():
        yield None
        return
    store = open_store(place.database)
    try:
        yield store
    finally:
        store.close()


def _lines(
    decision: AcceptanceDecision, *, again: AcceptanceVerdict, agrees: bool
) -> Iterator[tuple[str, object]]:
    rule = decision.rule
    yield "id", decision.decision_id
    yield "stored", explain(decision.verdict, rule=rule)
    same = "the same, from the stored windows"
    yield "decided again", same if agrees else explain(again, rule=rule) + " - NOT as stored"
    yield "decided", f"{utc(decision.decided_at)}, by {decision.initiated_by}"
    yield "hardware", decision.key.hardware
    yield "model", f"{decision.key.model}, {decision.key.dtype}"
    yield "from", values_in_words(decision.config_from)
    yield "change", _change(decision)
    yield from _verdict_lines(decision.verdict)
    yield "windows", f"{len(decision.windows)} of {rule.metric}"
    tested = [window for window in decision.windows if window.stage is WindowStage.TEST]
    if any(window.status in BROKEN for window in tested):
        yield "targets kept", _kept_in_words(decision, tested)
    wanted = f"p < {rule.alpha:g}, gain over {rule.min_effect_frac:.1%}"
    if not rule.needs_gain:
        wanted = f"no more than {rule.max_loss_frac:.1%} lost"
    yield "rule", f"{rule.num_pairs} pairs, {wanted}, noise up to {rule.max_cv_frac:.1%}"


def _verdict_lines(verdict: AcceptanceVerdict) -> Iterator[tuple[str, object]]:
    yield "pairs", verdict.num_pairs
    limits = f"{in_percent(verdict.ci_lo)} to {in_percent(verdict.ci_hi)}"
    yield "gain", "-" if verdict.hl is None else f"{in_percent(verdict.hl)} ({limits})"
    yield "p", _number(verdict.p)
    yield "noise of a window", "-" if verdict.cv is None else f"{verdict.cv:.1%}"
    for name, bound in verdict.loss_bounds.items():
        yield f"{name} loss", f"at most {in_percent(bound)}"


def _kept_in_words(decision: AcceptanceDecision, tested: Sequence[AcceptanceWindow]) -> str:
    """In how many windows of the test each side met its targets, a floor of recall among them."""
    sides = [
        [window.status is TrialStatus.OK for window in tested if window.values == values]
        for values in (decision.config_to, decision.config_from)
    ]
    after, before = (f"in {sum(side)} of {len(side)} windows" for side in sides)
    return f"{after} with the change, {before} without"


def _change(decision: AcceptanceDecision) -> str:
    before, after = decision.config_from, decision.config_to
    return values_in_words(
        {name: after[name] for name in after if after[name] != before.get(name, "")}
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
