"""The plots of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sparsed.controller.bench.report import BenchReport
from sparsed.controller.bench.summary import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LATENCY_FILE: Final = "latency.png"
SERIES_FILE: Final = "time-series.png"
LONG_TAIL: Final = 20.0  # medians; a longer one would squeeze the rest into the margin
DOTS_PER_INCH: Final = 120
COLOUR: Final = "#1f5f8b"
TARGET_COLOUR: Final = "#b03a2e"


def write_plots(report: BenchReport, directory: Path) -> tuple[Path, ...]:
    """Distributions of the latencies, and the run second by second; OSError.

    Figures are made without pyplot: no window, no state of the process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / LATENCY_FILE, directory / SERIES_FILE
    for path, figure in zip(paths, (_latencies(report), _series(report)), strict=True):
        figure.savefig(path, dpi=DOTS_PER_INCH)
    return paths


def new_figure(title: str, *, width: float, height: float) -> Figure:
    """An empty one of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure


def _title(report: BenchReport) -> str:
    summary = report.summary
    return (
        f"{report.about.get('model', '')}: {summary.num_complete} of {summary.num_requests} "
        f"requests, {summary.output_tokens_per_s:.1f} output tokens/s"
    )


def _latencies(report: BenchReport) -> Figure:
    """The share of values that are no longer than x, for each of three latencies."""
    figure = new_figure(_title(report), width=12, height=4)
    complete = [record for record in report.result.records if record.is_complete]
    values_s = {
        "TTFT": [item.ttft_s for item in complete if item.ttft_s is not None],
        "TPOT": [item.tpot_s for item in complete if item.tpot_s is not None],
        "ITL": [gap_s for item in complete for gap_s in item.itl_s],
    }
    targets_s = {"TTFT": report.slo.ttft_s, "TPOT": report.slo.tpot_s}
    for axes, (name, found_s) in zip(figure.subplots(1, 3), values_s.items(), strict=True):
        _distribution(axes, name=name, values_s=found_s, target_s=targets_s.get(name))
    return figure


def _distribution(
    axes: Axes, *, name: str, values_s: Sequence[float], target_s: float | None
) -> None:
    axes.set_xlabel(f"{name}, ms")
    axes.set_ylabel("share of values up to x")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    found = spread(values_s)
    if found is None:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center")
        return
    axes.ecdf([1e3 * value_s for value_s in values_s], color=COLOUR)
    for frac, at_ms in ((0.50, found.p50_ms), (0.99, found.p99_ms)):
        axes.plot(at_ms, frac, "o", color=COLOUR, label=f"p{100 * frac:.0f}: {at_ms:.1f} ms")
    if target_s is not None:
        label = f"SLO: {1e3 * target_s:g} ms"
        axes.axvline(1e3 * target_s, color=TARGET_COLOUR, ls="--", label=label)
    if found.max_ms > LONG_TAIL * found.p50_ms > 0:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.legend(loc="lower right", fontsize=8)


def _series(report: BenchReport) -> Figure:
    figure = new_figure(_title(report), width=10, height=8)
    axes: Sequence[Axes] = figure.subplots(3, 1, sharex=True)
    seconds = report.seconds
    edges_s = [*(second.start_s for second in seconds), float(len(seconds))]
    rows = (
        ("requests under way", [second.running for second in seconds]),
        ("output tokens/s", [second.output_tokens_per_s for second in seconds]),
    )
    for row, (label, values) in zip(axes, rows, strict=False):
        row.stairs(values, edges_s, color=COLOUR, fill=True, alpha=0.6)
        row.set_ylabel(label)
    _first_tokens(axes[2], report)
    axes[2].set_xlabel("seconds of the run")
    figure.align_ylabels()
    for row in axes:
        row.set_ylim(bottom=0)
        row.grid(alpha=0.3)
    return figure


def _first_tokens(axes: Axes, report: BenchReport) -> None:
    """Every TTFT at the time of its token."""
    points = [
        (record.first_s, 1e3 * record.ttft_s)
        for record in report.result.records
        if record.first_s is not None and record.ttft_s is not None
    ]
    first_sent_s = min((item.sent_s for item in report.result.records if item.sent_s), default=0.0)
    axes.plot(
        [at_s - first_sent_s for at_s, _ in points],
        [ttft_ms for _, ttft_ms in points],
        ".",
        color=COLOUR,
    )
    axes.set_ylabel("TTFT, ms")
