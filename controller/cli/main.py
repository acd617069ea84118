"""``sparsed``: the verbs, and what their failures look like to a shell."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

import sparsed
from sparsed.controller.cli import (
    bench,
    daemon,
    decision,
    eval,
    knobs,
    model,
    plan,
    profile,
    record,
    start,
    tune,
    tuner,
    why,
)
from sparsed.controller.cli.output import complain
from sparsed.controller.cli.session import ERROR
from sparsed.core import ExitCode, InputError, StartError
from sparsed.db.store import StoreError

# They work alone and exit with sysexits numbers.
LOCAL_VERBS = ("start", "tune", "model", "bench", "eval", "plan")
_TYPER_USAGE_ERROR = 2

app = typer.Typer(
    name="sparsed",
    help="Serve a long-context LLM with sparse attention over two KV tiers.",
    epilog=(
        "Exit codes of the verbs that ask a daemon: 0 ok, 1 error, 2 usage, 3 not running, "
        "4 degraded, 5 restart pending. start, tune, model, bench, eval and plan: 64 usage, 65 data, "
        "69 unavailable, 70 bug, 75 temporary, 77 permission, 78 configuration."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("start")(start.start)
app.command("status")(daemon.status)
app.command("why")(why.why)
app.command("drain")(daemon.drain)
app.command("stop")(daemon.stop)
app.command("record")(record.record)
app.command("tune")(tune.tune)
app.command("eval")(eval.evaluate)
app.command("plan")(plan.plan)
app.add_typer(knobs.app, name="knobs")
app.add_typer(tuner.app, name="tuner")
app.add_typer(profile.app, name="profile")
app.add_typer(decision.app, name="decision")
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparsed {sparsed.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Serve a long-context LLM with sparse attention over two KV tiers."""


def main() -> None:
    """Run the command line and exit; only a bug shows a traceback."""
    raise SystemExit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Exit status of ``sparsed ARGUMENTS``."""
    is_local = bool(arguments) and arguments[0] in LOCAL_VERBS
    try:
        app(arguments, prog_name="sparsed")
    except SystemExit as finished:
        code = int(finished.code or 0)
        return ExitCode.USAGE if is_local and code == _TYPER_USAGE_ERROR else code
    except (StartError, InputError) as error:
        complain(str(error))
        return error.code if is_local else ERROR
    except StoreError as error:
        complain(str(error))
        return ExitCode.DATA if is_local else ERROR
    except Exception:  # noqa: BLE001  # the outermost frame: a bug has an exit status too
        traceback.print_exc()
        return ExitCode.SOFTWARE if is_local else ERROR
    return ExitCode.OK
