"""The figures of a study, as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Final

from sparsed.controller.bench.plots import DOTS_PER_INCH, new_figure
from sparsed.core import TrialResult
from sparsed.tuner.importance import pareto_front
from sparsed.tuner.offline import DEFAULT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THROUGHPUT: Final = "output_tokens_per_s"
COSTS: Final = {"tpot_p95_s": "TPOT p95, ms", "ttft_p95_s": "TTFT p95, ms"}
COLOUR: Final = "#1f5f8b"
INFEASIBLE_COLOUR: Final = "#b03a2e"
WINNER_COLOUR: Final = "#2e8b57"
NOTHING: Final = "nothing was measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """What the trials of a plot are drawn as."""

    marker: str
    colour: str
    size: float
    label: str


def pareto_png(trials: Sequence[TrialResult], *, winner: TrialResult | None) -> bytes:
    """Both latencies over throughput, a dot for each trial that was measured, and the front."""
    figure = new_figure("latency over throughput, medians of a trial", width=11, height=4.5)
    for axes, (cost, label) in zip(figure.subplots(1, 2), COSTS.items(), strict=True):
        axes.set_xlabel("output tokens/s")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        _draw_trials(axes, trials, cost=cost, winner=winner)
    return _png(figure)


def importance_png(effects: Mapping[str, float]) -> bytes:
    """A bar for each knob, the greatest on top."""
    height = 1.6 + 0.4 * max(1, len(effects))
    title = "effect of each knob on the score, by a model learned from the trials"
    figure = new_figure(title, width=8, height=height)
    axes = figure.add_subplot()
    axes.set_xlabel("share of the variance of the log score that the knob has a part in")
    if not effects:
        axes.text(0.5, 0.5, "too few trials to tell", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
        return _png(figure)
    names = list(effects)[::-1]
    bars = axes.barh(names, [effects[name] for name in names], color=COLOUR)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.set_xlim(0, 1.12 * max(*effects.values(), 0.01))
    return _png(figure)


def _draw_trials(
    axes: Axes, trials: Sequence[TrialResult], *, cost: str, winner: TrialResult | None
) -> None:
    drawn = [item for item in trials if {THROUGHPUT, cost} <= item.metrics.keys()]
    if not drawn:
        axes.text(0.5, 0.5, NOTHING, transform=axes.transAxes, ha="center")
        return
    front = pareto_front(trials, cost=cost)
    if front:
        axes.step(*_places(front, cost), where="pre", color=COLOUR, alpha=0.5, label="front")
    groups: dict[Marks, list[TrialResult]] = {}
    for item in drawn:
        groups.setdefault(_marks(item, winner=winner), []).append(item)
    for marks, alike in groups.items():
        x, y = _places(alike, cost)
        axes.scatter(
            x, y, marker=marks.marker, c=marks.colour, s=marks.size, label=marks.label, zorder=3
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _marks(trial: TrialResult, *, winner: TrialResult | None) -> Marks:
    if winner is not None and trial.number == winner.number:
        return Marks(marker="*", colour=WINNER_COLOUR, size=160, label="winner")
    if trial.arm == DEFAULT:
        return Marks(marker="s", colour="black", size=50, label="default")
    if trial.score is None:
        return Marks(marker="x", colour=INFEASIBLE_COLOUR, size=36, label="infeasible")
    return Marks(marker="o", colour=COLOUR, size=30, label="feasible")


def _places(trials: Sequence[TrialResult], cost: str) -> tuple[list[float], list[float]]:
    """Output tokens/s and ms."""
    return (
        [item.metrics[THROUGHPUT] for item in trials],
        [1e3 * item.metrics[cost] for item in trials],
    )


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
