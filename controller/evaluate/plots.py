"""The plots of an evaluation, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sparsed.controller.bench.plots import DOTS_PER_INCH, new_figure
from sparsed.controller.evaluate.report import needle_lengths, share_in_words
from sparsed.core import RESIDENCIES, Choice, EvaluationReport, NeedleScore, Quality, RankMethod

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUALITY_FILE: Final = "quality.png"
RECALL_FILE: Final = "recall.png"
LOCALITY_FILE: Final = "locality.png"
NEEDLES_FILE: Final = "needles.png"
COLUMNS: Final = 3
TITLE_CHARS: Final = 48
DENSE_COLOUR: Final = "#888888"


def write_plots(report: EvaluationReport, directory: Path) -> tuple[Path, ...]:
    """Perplexity against reads, recall by head, misses by residency, and needles where there are
    any; OSError. What no choice has is not drawn."""
    directory.mkdir(parents=True, exist_ok=True)
    figures = {
        QUALITY_FILE: _quality(report),
        RECALL_FILE: _recall(report),
        LOCALITY_FILE: _locality(report),
        NEEDLES_FILE: _needles(report),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(directory / name)
            figure.savefig(paths[-1], dpi=DOTS_PER_INCH)
    return tuple(paths)


def _title(report: EvaluationReport) -> str:
    tokens = report.num_windows * report.scored_tokens
    return f"{Path(report.model).name}: {tokens} tokens after {report.context_tokens}"


def _quality(report: EvaluationReport) -> Figure | None:
    """The ratio of perplexities over reads: a panel for each text, a line for each method."""
    rows = _sparse(report.quality)
    texts = tuple(dict.fromkeys(row.text for row in rows))
    if not texts:
        return None
    figure, panels = _grid(_title(report), len(texts), width=5.5, height=4.5)
    for axes, text in zip(panels, texts, strict=True):
        for name, alike in _by_name(row for row in rows if row.text == text):
            points = sorted(alike, key=lambda row: row.reads)
            ratios = [row.ratio for row in points]
            low = [row.ratio - row.ratio_low for row in points]
            high = [row.ratio_high - row.ratio for row in points]
            reads = [row.reads for row in points]
            axes.errorbar(reads, ratios, yerr=(low, high), marker="o", capsize=2, label=name)
        axes.axhline(1, color=DENSE_COLOUR, ls="--", label="dense")
        _label(axes, title=text, x="tokens read over tokens of context", y="perplexity over dense")
        axes.legend(fontsize=7)
    return figure


def _recall(report: EvaluationReport) -> Figure | None:
    """Recall by layer and head of each method at the share in the middle, first text."""
    rows = [row for row in _sparse(report.quality) if row.recall_by_head]
    if not rows:
        return None
    chosen = [_middle(alike) for _, alike in _by_name(r for r in rows if r.text == rows[0].text)]
    title = f"{_title(report)}: recall on {rows[0].text}"
    figure, panels = _grid(title, len(chosen), width=4, height=4)
    for axes, row in zip(panels, chosen, strict=True):
        image = axes.imshow(row.recall_by_head, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        _label(axes, title=_name_and_share(row.choice), x="query head", y="sparse layer")
    figure.colorbar(image, ax=panels, shrink=0.7)
    return figure


def _locality(report: EvaluationReport) -> Figure | None:
    """Misses of an LRU over its size: a panel for each text."""
    rows = [row for row in _sparse(report.quality) if row.locality is not None]
    texts = tuple(dict.fromkeys(row.text for row in rows))
    if not texts:
        return None
    figure, panels = _grid(_title(report), len(texts), width=5.5, height=4.5)
    for axes, text in zip(panels, texts, strict=True):
        for row in rows:
            if row.text == text and row.locality is not None:
                label = _name_and_share(row.choice)
                axes.plot(RESIDENCIES, row.locality.miss_fracs, marker=".", label=label)
        _label(
            axes, title=text, x="resident pages per selected page", y="misses, share of selections"
        )
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    return figure


def _needles(report: EvaluationReport) -> Figure | None:
    """The share of needles found by depth and length: a panel for each choice."""
    choices = tuple(dict.fromkeys(score.choice for score in report.needles))
    if not choices:
        return None
    figure, panels = _grid(f"{_title(report)}: needles", len(choices), width=4, height=4)
    lengths = needle_lengths(report)
    depths = sorted({score.depth for score in report.needles})
    for axes, choice in zip(panels, choices, strict=True):
        scores = {(s.depth, s.length): _frac(s) for s in report.needles if s.choice == choice}
        cells = [[scores[depth, length] for length in lengths] for depth in depths]
        image = axes.imshow(cells, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        _label(axes, title=_name_and_share(choice), x="tokens", y="depth")
    figure.colorbar(image, ax=panels, shrink=0.7)
    return figure


def _grid(title: str, count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels, at most COLUMNS in a row, ``width`` x ``height`` inches."""
    columns = min(count, COLUMNS)
    rows = ceil(count / columns)
    figure = new_figure(title, width=columns * width, height=rows * height)
    panels = [figure.add_subplot(rows, columns, 1 + number) for number in range(count)]
    return figure, panels


def _label(axes: Axes, *, title: str, x: str, y: str) -> None:
    axes.set_title(_wrapped(title), fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _wrapped(title: str) -> str:
    """In lines that fit a panel, broken at commas."""
    lines = [""]
    for part in title.split(","):
        joined = f"{lines[-1]},{part}" if lines[-1] else part
        if len(joined) > TITLE_CHARS and lines[-1]:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] = joined
    return "\n".join(lines)


def _sparse(rows: Iterable[Quality]) -> list[Quality]:
    return [row for row in rows if row.choice.method is not RankMethod.DENSE]


def _by_name(rows: Iterable[Quality]) -> list[tuple[str, list[Quality]]]:
    """Rows of choices that differ in their share alone, together."""
    found: dict[str, list[Quality]] = {}
    for row in rows:
        found.setdefault(row.choice.written(share=False), []).append(row)
    return list(found.items())


def _middle(rows: Sequence[Quality]) -> Quality:
    return sorted(rows, key=lambda row: row.choice.share)[len(rows) // 2]


def _name_and_share(choice: Choice) -> str:
    name = choice.written(share=False)
    is_dense = choice.method is RankMethod.DENSE
    return name if is_dense else f"{name} at {share_in_words(choice.share)}"


def _frac(score: NeedleScore) -> float:
    return score.num_found / score.num_asked
