"""``sparsed knobs list|explain|set|reset``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sparsed.controller.cli.live_words import live_words
from sparsed.controller.cli.output import Output, OutputOption, print_json, print_table
from sparsed.controller.cli.session import (
    RESTART_PENDING,
    DryRunOption,
    ReasonOption,
    StateDirOption,
    connect,
)
from sparsed.core import KNOB_GUIDES, KnobClass

if TYPE_CHECKING:
    from sparsed.controller.control import KnobState
    from sparsed.core import KnobGuide, KnobValue

SOURCE_WORDS: Final = {
    "default": "its default",
    "machine": "what the machine has",
    "profile": "the profile of this start",
    "file": "the configuration file",
    "environment": "an environment variable",
    "flag": "a flag of this start",
    "live": "sparsed knobs set, now or for this start",
}
CLASS_WORDS: Final = {
    KnobClass.HOT: "between two steps of a running engine",
    KnobClass.RESTART: "at the next start",
}

app = typer.Typer(help="Read and change settings of the running daemon.", no_args_is_help=True)


@app.command("list")
def list_(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show every knob: value, where it came from, class, range."""
    with connect(state_dir) as client:
        states = client.list_knobs()
    _show(states, output)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="KNOB", help="As in: knobs list.")],
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show what a knob does, what rises and falls with it, what bounds it, and its value now.

    sparsed why says which knobs would help now.
    """
    name = name.strip().replace("-", "_")
    if name not in KNOB_GUIDES:
        raise typer.BadParameter(f"unknown knob {name!r}; known: {', '.join(KNOB_GUIDES)}")
    with connect(state_dir) as client:
        states = {state.spec.name: state for state in client.list_knobs()}
        status, pins = client.status(), client.tuner().pins
    state, guide = states[name], KNOB_GUIDES[name]
    live = live_words(name, knobs=status.knobs, slo=status.slo, pins=pins)
    if output is Output.JSON:
        print_json({"knob": state, "guide": guide, "live_tuner": live})
    else:
        print_table((name, ""), _explanation(state, guide, live=live))


@app.command("set")
def set_(
    assignments: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="Names as in: knobs list.")
    ],
    dry_run: DryRunOption = False,
    reason: ReasonOption = "",
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Change knobs: hot ones now, the others at the next start (exit status 5).

    Waits until they are in force; on a GPU the engine may have to get ready beside its requests.
    """
    values = dict(_assignment(text) for text in assignments)
    with connect(state_dir, write=True) as client:
        states = client.set_knobs(values, validate_only=dry_run, reason=reason)
    _report(states, names=values, output=output)


@app.command()
def reset(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As in: knobs list.")],
    dry_run: DryRunOption = False,
    reason: ReasonOption = "",
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Set knobs back to their fixed defaults."""
    with connect(state_dir, write=True) as client:
        states = client.reset_knobs(names, validate_only=dry_run, reason=reason)
    _report(states, names=names, output=output)


def _explanation(state: KnobState, guide: KnobGuide, *, live: str) -> Iterator[tuple[str, object]]:
    spec = state.spec
    fixed = spec.default is not None
    yield "what it is", spec.help
    yield "now", "auto" if state.value is None else f"{state.value} {spec.unit}".rstrip()
    yield "comes from", SOURCE_WORDS[state.source.value]
    if state.pending is not None:
        yield "after a restart", state.pending
    yield "default", spec.default if fixed else "auto" if spec.auto else "from the machine"
    yield "allowed", spec.allowed.removeprefix("allowed: ")
    yield "changes", CLASS_WORDS[spec.klass]
    yield "live tuner", live
    yield "rises with it", guide.rises
    yield "falls with it", guide.falls
    yield "bounded by", guide.bounded_by
    for move in guide.moves:
        waits = f", requests wait for {move.limit.value}" if move.limit else ""
        yield f"{'raise' if move.up else 'lower'} it if {move.bound.value}{waits}", move.why


def _assignment(text: str) -> tuple[str, KnobValue]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, for example token_budget=1024")
    return name.strip().replace("-", "_"), value.strip()


def _report(states: tuple[KnobState, ...], *, names: Iterable[str], output: Output) -> None:
    changed = [state for state in states if state.spec.name in set(names)]
    _show(changed, output)
    if any(state.pending is not None for state in changed):
        raise typer.Exit(RESTART_PENDING)


def _show(states: Iterable[KnobState], output: Output) -> None:
    if output is Output.JSON:
        print_json(list(states))
        return
    print_table(
        ("knob", "value", "unit", "source", "class", "after restart", "allowed"),
        (
            (
                state.spec.name,
                "auto" if state.value is None else state.value,
                state.spec.unit,
                state.source.value,
                state.spec.klass.value,
                state.pending,
                state.spec.allowed.removeprefix("allowed: "),
            )
            for state in states
        ),
    )
