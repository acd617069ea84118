"""``sparsed start``: the daemon in the foreground, in the background, or only its plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sparsed.controller.cli.flags import KNOB_FLAGS, MODEL_FLAGS, SERVING_FLAGS, takes
from sparsed.controller.cli.progress import ProgressLine
from sparsed.controller.config import DaemonConfig, load_config
from sparsed.core import InputError

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        help="Keys are flag names with underscores, and config_version = 1. A flag wins over "
        "SPARSED_* in the environment, that over knobs set for the next start, those over the "
        "file, the file over a stored profile.",
    ),
]


@takes(*MODEL_FLAGS, *SERVING_FLAGS, *KNOB_FLAGS)
def start(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", show_default=False, help="As --model.")
    ] = None,
    config: ConfigOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the memory plan and how many requests fit; start nothing."
        ),
    ] = False,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Run in the background; return when it is ready, or has failed."
        ),
    ] = False,
    **flags: str | bool | None,
) -> None:
    """Serve a model until it is stopped."""
    flags["model"] = one_model(model_argument, flags["model"])
    configuration = load_config(flags=flags, environment=os.environ, file=config)
    if dry_run:
        _print_plan(configuration)
    elif detach:
        from sparsed.controller.cli.detach import start_detached

        raise typer.Exit(start_detached(configuration.state_dir))
    else:
        _serve(configuration)


def one_model(argument: str | None, flag: str | bool | None) -> str | bool | None:
    """The model given as argument or as flag; InputError if both are given and differ."""
    if argument and flag and argument != flag:
        raise InputError(f"two models are given, {argument} and {flag}; drop one", field="model")
    return argument or flag


def _print_plan(configuration: DaemonConfig) -> None:
    from sparsed.controller.startup import describe_plan, prepare

    print(describe_plan(prepare(configuration, progress=ProgressLine())))


def _serve(configuration: DaemonConfig) -> None:
    import asyncio

    from sparsed.controller.daemon import run

    raise typer.Exit(asyncio.run(run(configuration)))
