"""``sparsed tune``: an offline search on the real engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sparsed.controller.cli.flags import (
    DEVICES_FLAG,
    MODEL_FLAGS,
    TRIAL_FLAGS,
    WINNER_RECALL_FLAG,
    takes,
)
from sparsed.controller.cli.start import ConfigOption, one_model
from sparsed.controller.config import load_config
from sparsed.core import InputError, Objective, SearchMethod

OWN_FLAGS = {flag.name: flag for flag in (DEVICES_FLAG, WINNER_RECALL_FLAG)}
TUNED_MODEL_FLAGS = tuple(OWN_FLAGS.get(flag.name, flag) for flag in MODEL_FLAGS)


@takes(*TUNED_MODEL_FLAGS, *TRIAL_FLAGS)
def tune(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", show_default=False, help="As --model.")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|PRESET",
            help="chat, documents, mixed, or a JSONL file with timestamp (ms), input_length and "
            "output_length (tokens) on each line. Default: mixed.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A recording of sparsed record, as --workload FILE. Its first requests are "
            "served, as many as a window holds, at their own lengths or all shortened alike, their "
            "arrivals drawn together to half the window.",
        ),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Trials of the search, and as many of a random one beside it.",
        ),
    ] = 10,
    method: Annotated[
        SearchMethod,
        typer.Option(
            help="constrained: Bayesian, with a model of every target; skopt: stock "
            "scikit-optimize; grid; random: alone."
        ),
    ] = SearchMethod.CONSTRAINED,
    objective: Annotated[
        Objective,
        typer.Option(
            help="throughput: output tokens/s; goodput: requests/s within both SLO targets; "
            "latency: answers of 256 tokens/s for one reader, at the p95 of TTFT and TPOT; balanced: "
            "the geometric mean of throughput and latency; capacity: output tokens/s for each GiB "
            "of the hot tier in use at its peak. SLO targets hold for all."
        ),
    ] = Objective.THROUGHPUT,
    trial_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Measured time of a trial, in two windows; the workload is cut to it. "
            "Default: 6 on a CPU, 30 on a GPU.",
        ),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Time for all of it but ending the engine, two fifths of it for the search. What "
            "is measured then is cut off, and a test that was cut off verifies nothing. Default: "
            "no end.",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the result here; .toml, .json, .env, .sh, .md, or .yaml for vLLM.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write pareto.png, importance.png, report.html with both in it, and result.json.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="STUDY",
            help="Go on with this study, or the last one of these options: no point that ended or "
            "failed is measured again. Refused if model, GPU, question or search space differ.",
        ),
    ] = None,
    config: ConfigOption = None,
    **flags: str | bool | None,
) -> None:
    """Search for the best configuration of a model on this machine, and keep the profile.

    Begins from the nearest profile, stored or shipped (see: sparsed profile list), unless
    --no-profile says otherwise. Owns the machine while it runs. Knobs given as flags are fixed;
    Ctrl-C keeps what was measured.
    With several GPUs of one kind, as --device cuda:0,cuda:1, each has an engine of its own and takes
    a trial whenever it is free; the host's memory is divided among them. The default runs on
    the first one alone, and all that follows the search on the first one that still works.
    What the search recommends, the next best (three in all) and the default are measured again in
    five other arrival orders; the one whose worst run is the best is then tested against the
    default, in 32 pairs of windows.
    """
    from sparsed.controller.tune_devices import split_devices
    from sparsed.controller.tune_options import TuneOptions
    from sparsed.controller.tuning import run_tune

    if workload is not None and trace is not None:
        raise InputError("--trace is a --workload: give one of them", field="trace")
    flags["model"] = one_model(model_argument, flags["model"])
    devices = split_devices(flags["device"]) if isinstance(flags["device"], str) else ()
    flags["device"] = devices[0] if devices else None
    options = TuneOptions(
        config=load_config(flags=flags, environment=os.environ, file=config),
        workload=str(trace.absolute()) if trace else workload or "mixed",
        trials=trials,
        objective=objective,
        method=method,
        trial_s=trial_seconds,
        max_s=max_seconds,
        export=export,
        output_dir=output_dir,
        resume=resume,
        devices=devices,
    )
    raise typer.Exit(run_tune(options))
