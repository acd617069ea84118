"""``sparsed tuner off|observe|advise|status``: the live tuner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sparsed.controller.cli.output import Output, OutputOption, print_json
from sparsed.controller.cli.session import StateDirOption, connect
from sparsed.core import TunerMode

if TYPE_CHECKING:
    from sparsed.controller.control import TunerState

app = typer.Typer(
    help="The tuner of the running daemon. It gives advice; it changes nothing by itself.",
    no_args_is_help=True,
)


@app.command()
def off(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Neither collect observations nor give advice."""
    _switch(state_dir, TunerMode.OFF, output)


@app.command()
def observe(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Collect observations from live traffic, give no advice."""
    _switch(state_dir, TunerMode.OBSERVE, output)


@app.command()
def advise(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Collect observations and say which hot knobs to change; see: sparsed tuner status."""
    _switch(state_dir, TunerMode.ADVISE, output)


@app.command()
def status(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show the mode, the number of observations and the advice, newest first."""
    with connect(state_dir) as client:
        state = client.tuner()
    _show(state, output)


def _switch(state_dir: Path | None, mode: TunerMode, output: Output) -> None:
    with connect(state_dir, write=True) as client:
        state = client.tuner(mode)
    _show(state, output)


def _show(state: TunerState, output: Output) -> None:
    if output is Output.JSON:
        print_json(state)
        return
    print(f"mode {state.mode.value}, {state.num_observations} observations")
    for decision in state.decisions:
        change = " ".join(f"{name}={value}" for name, value in decision.values.items())
        print(f"advice: {change or 'hold'}: {decision.reason}")
