"""``sparsed knobs list|set|reset``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed.controller.cli.output import Output, OutputOption, print_json, print_table
from sparsed.controller.cli.session import (
    RESTART_PENDING,
    DryRunOption,
    ReasonOption,
    StateDirOption,
    connect,
)

if TYPE_CHECKING:
    from sparsed.controller.control import KnobState
    from sparsed.core import KnobValue

app = typer.Typer(help="Read and change settings of the running daemon.", no_args_is_help=True)


@app.command("list")
def list_(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show every knob: value, where it came from, class, range."""
    with connect(state_dir) as client:
        states = client.list_knobs()
    _show(states, output)


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
