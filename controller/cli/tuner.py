"""``sparsed tuner``: the live tuner of the running daemon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed.controller.cli.live_words import live_words
from sparsed.controller.cli.load import load_in_words
from sparsed.controller.cli.output import Output, OutputOption, print_json
from sparsed.controller.cli.session import ReasonOption, StateDirOption, connect
from sparsed.controller.control import TunerVerb
from sparsed.core import KnobValue, TunerMode

if TYPE_CHECKING:
    from sparsed.controller.control import TunerState

KnobArgument = Annotated[str, typer.Argument(metavar="KNOB", help="Name of a hot knob.")]

app = typer.Typer(
    help="The tuner of the running daemon. It gives advice; in mode auto alone it changes hot knobs "
    "by itself, one tested candidate at a time. A start begins in mode advise.",
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
def auto(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Test advice on live traffic, in turns with the values before, and keep what is proved
    better. At most 5 % of the busy time goes to candidates. Knobs that the start was given, and
    pinned ones, are left alone."""
    _switch(state_dir, TunerMode.AUTO, output)


@app.command()
def approve(
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
    reason: ReasonOption = "",
) -> None:
    """Have the newest advice tested like a candidate of mode auto, as soon as there is time for
    it. Also in mode advise."""
    _steer(state_dir, TunerVerb.APPROVE, output, reason=reason)


@app.command()
def reject(
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
    reason: ReasonOption = "",
) -> None:
    """End the candidate that waits or is tested, and go back to the values before it. One that is
    on probation stays. The values of a compatible profile, advised or tested, do not come again
    on these versions."""
    _steer(state_dir, TunerVerb.REJECT, output, reason=reason)


@app.command()
def pin(
    knob: KnobArgument,
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
    reason: ReasonOption = "",
) -> None:
    """Leave this hot knob alone from now on, also after restarts. A test of it ends."""
    _steer(state_dir, TunerVerb.PIN, output, knob=knob, reason=reason)


@app.command()
def unpin(
    knob: KnobArgument,
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
    reason: ReasonOption = "",
) -> None:
    """Let the tuner change this knob again, and say whether it may."""
    with connect(state_dir, write=True) as client:
        state = client.steer_tuner(TunerVerb.UNPIN, knob=knob, reason=reason)
        status = client.status()
    _show(state, output)
    if output is Output.TEXT:
        words = live_words(knob, knobs=status.knobs, slo=status.slo, pins=state.pins)
        print(f"{knob}: the live tuner {words}")


@app.command()
def freeze(
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
    reason: ReasonOption = "",
) -> None:
    """Test no candidate until unfreeze, also after restarts. A test under way ends; advice goes
    on."""
    _steer(state_dir, TunerVerb.FREEZE, output, reason=reason)


@app.command()
def unfreeze(
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
    reason: ReasonOption = "",
) -> None:
    """Allow tests again."""
    _steer(state_dir, TunerVerb.UNFREEZE, output, reason=reason)


@app.command()
def kill(
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
    reason: ReasonOption = "",
) -> None:
    """The kill switch: undo what is tested or on probation, and turn the tuner off, also after
    restarts. The same as a file tuner.kill in the state directory."""
    _steer(state_dir, TunerVerb.KILL, output, reason=reason)


@app.command()
def revive(
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
    reason: ReasonOption = "",
) -> None:
    """Lift the kill switch and safe mode. The tuner stays off until it is given a mode; after safe
    mode, the next start takes the last known good again."""
    _steer(state_dir, TunerVerb.REVIVE, output, reason=reason)


@app.command()
def status(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show the mode, what became of candidates, and the advice, newest first."""
    with connect(state_dir) as client:
        state = client.tuner()
    _show(state, output)


def _switch(state_dir: Path | None, mode: TunerMode, output: Output) -> None:
    with connect(state_dir, write=True) as client:
        state = client.tuner(mode)
    _show(state, output)


def _steer(
    state_dir: Path | None, verb: TunerVerb, output: Output, *, knob: str = "", reason: str
) -> None:
    with connect(state_dir, write=True) as client:
        state = client.steer_tuner(verb, knob=knob, reason=reason)
    _show(state, output)


def _show(state: TunerState, output: Output) -> None:
    if output is Output.JSON:
        print_json(state)
        return
    print(f"mode {state.mode.value}, {state.num_observations} observations")
    limits = {"killed": state.killed, "safe mode": state.safe_mode, "frozen": state.frozen}
    if stops := [name for name, is_set in limits.items() if is_set]:
        print(f"stopped: {', '.join(stops)}")
    if state.pins:
        print(f"left alone: {' '.join(state.pins)}")
    print(
        f"candidate: {state.hold or 'under test'}; {state.explored_frac:.1%} of the busy time so far"
    )
    for line in load_in_words(state.load):
        print(line)
    for record in state.rollouts:
        who = f"by {record.initiated_by}" + (f", {record.profile}" if record.profile else "")
        print(f"{record.state}: {_change(record.config_to)}: {record.reason}, {who}")
    for decision in state.decisions:
        print(f"advice: {_change(decision.values) or 'hold'}: {decision.reason}")


def _change(values: Mapping[str, KnobValue]) -> str:
    shown = sorted(values.items())
    return " ".join(f"{name}={'auto' if item is None else item}" for name, item in shown)
