"""``sparsed eval``: what a choice of pages costs in quality, on texts that are known."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sparsed.controller.cli.bench_engine import (
    PLACE_FLAGS,
    FileOption,
    choose_flags,
    write_file,
)
from sparsed.controller.cli.flags import takes
from sparsed.controller.cli.output import FormatOption, Output, print_json, print_table
from sparsed.controller.cli.progress import ProgressLine
from sparsed.controller.config import load_config
from sparsed.controller.writable import check_directory, check_file
from sparsed.core import InputError

if TYPE_CHECKING:
    from sparsed.controller.evaluate.plan import EvaluateOptions
    from sparsed.core import EvaluationReport

TEXTS: Final = ("documentation", "prose")
CHOICES: Final = ("mean-key", "cuboid-mean", "oracle")
SHARES: Final = ("1/8", "1/4")
CONTEXT_TOKENS: Final = 2048
SCORED_TOKENS: Final = 128
NUM_WINDOWS: Final = 2

TextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="NAME|FILE",
        help="prose, documentation, code, questions, or a UTF-8 file; repeatable. Default: "
        f"{' and '.join(TEXTS)}.",
    ),
]
ChoiceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--choice",
        metavar="METHOD[:KEY=VALUE,...]",
        help="What to compare, as mean:page_size=16,metadata=int4; repeatable. Methods and keys "
        f"are in docs/benchmarking.md. Default: {'; '.join(CHOICES)}.",
    ),
]
ShareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--share",
        metavar="F",
        help="Part of the context that is read, as 1/16, for every choice without one of its own; "
        f"repeatable. Default: {' and '.join(SHARES)}.",
    ),
]
ContextOption = Annotated[
    int,
    typer.Option("--context", metavar="TOKENS", min=128, help="Tokens before the scored ones."),
]
ScoredOption = Annotated[
    int, typer.Option("--scored", metavar="TOKENS", min=1, help="Tokens scored in each window.")
]
WindowsOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Windows of each text; more narrow the interval.")
]
NeedlesOption = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Numbers hidden at each length and depth, to be found."),
]
DepthsOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Depths that needles are hidden at.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What was learned of the model; budgets and gate need it, kept_dims go by its basis.",
    ),
]
CalibrateOption = Annotated[
    bool,
    typer.Option(
        "--calibrate", help="Make that file first, of parts of the texts that are not scored."
    ),
]
PlotsOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write plots here, as PNG files.")
]


@takes(*choose_flags(*PLACE_FLAGS))
def evaluate(
    text: TextOption = None,
    context: ContextOption = CONTEXT_TOKENS,
    scored: ScoredOption = SCORED_TOKENS,
    windows: WindowsOption = NUM_WINDOWS,
    choice: ChoiceOption = None,
    share: ShareOption = None,
    needles: NeedlesOption = 0,
    needle_depths: DepthsOption = 8,
    calibration: CalibrationOption = None,
    calibrate: CalibrateOption = False,
    output: FileOption = None,
    plots: PlotsOption = None,
    format: FormatOption = Output.TEXT,
    **flags: str | bool | None,
) -> None:
    """Measure what sparse attention costs in quality: perplexity, attention recall, needles.

    Every choice decodes the same text after the same context; ratio is perplexity over that of
    dense attention. Without options: the built-in model on a short context, two minutes on two
    cores. Give more --context, --scored and --windows for figures to decide by.

    Owns the device while it runs: not beside a daemon of the same state directory.
    """
    from sparsed.controller.evaluate.choices import cross, parse_choice, parse_share
    from sparsed.controller.evaluate.plan import EvaluateOptions

    options = EvaluateOptions(
        choices=cross(
            [parse_choice(item) for item in choice or CHOICES],
            [parse_share(item) for item in share or SHARES],
        ),
        texts=tuple(dict.fromkeys(text or TEXTS)),
        context_tokens=context,
        scored_tokens=scored,
        num_windows=windows,
        needles=needles,
        needle_depths=needle_depths,
        calibration=calibration,
        calibrate=calibrate,
    )
    check_file(output, option="output")
    check_directory(plots, option="plots")
    report = _run(options, flags, quiet=format is Output.JSON)
    _finish(report, output=output, plots=plots, format=format)


def _run(
    options: EvaluateOptions, flags: dict[str, str | bool | None], *, quiet: bool
) -> EvaluationReport:
    from sparsed.controller.evaluate.plan import run_evaluation

    config = load_config(flags=flags, environment=os.environ)
    return run_evaluation(config, options, on_progress=ProgressLine(only_terminal=quiet))


def _finish(
    report: EvaluationReport, *, output: Path | None, plots: Path | None, format: Output
) -> None:
    """Print, and write what was asked for."""
    from sparsed.controller.evaluate.report import to_plain

    plain = to_plain(report, arguments=sys.argv[1:])
    if format is Output.JSON:
        print_json(plain)
    else:
        _print(report)
    write_file(output, plain)
    for path in _plot(report, plots):
        if format is Output.TEXT:
            print(f"wrote {path}")


def _print(report: EvaluationReport) -> None:
    from sparsed.controller.evaluate.report import (
        HEADERS,
        in_plain_words,
        needle_headers,
        needle_rows,
        quality_rows,
    )

    print_table(HEADERS, quality_rows(report))
    if report.needles:
        print_table(needle_headers(report), needle_rows(report))
    print(
        f"{report.dtype} on {report.device_name}; {report.num_windows} x {report.scored_tokens} "
        f"tokens scored after {report.context_tokens}; more with --context, --scored, --windows"
    )
    words = in_plain_words(report)
    if words is not None:
        print(words)


def _plot(report: EvaluationReport, directory: Path | None) -> tuple[Path, ...]:
    if directory is None:
        return ()
    from sparsed.controller.evaluate.plots import write_plots

    try:
        return write_plots(report, directory)
    except OSError as error:
        raise InputError(f"--plots {directory}: {error}", field="plots") from None
