"""A report on paper: JSON data, rows of tables, and a line of plain words."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Final

from sparsed import __version__
from sparsed.controller.evaluate.gaps import gap_closed
from sparsed.core import RESIDENCIES, EvaluationReport, NeedleScore, Quality, RankMethod

HEADERS: Final = (
    "text",
    "choice",
    "share",
    "perplexity",
    "ratio",
    "95 %",
    "reads",
    "metadata B",
    "recall",
    "p10",
    "p01",
    "error",
    "misses 4x",
    "gap closed",
)
SHOWN_RESIDENCY: Final = 4.0
MAX_DENOMINATOR: Final = 64
_ENDS: Final = (RankMethod.DENSE, RankMethod.ORACLE, RankMethod.RANDOM)


def to_plain(report: EvaluationReport, *, arguments: Sequence[str]) -> dict[str, object]:
    """The report as JSON data, with the command and the versions that made it."""
    plain = {item.name: getattr(report, item.name) for item in fields(report)}
    versions = {"sparsed": __version__, "python": platform.python_version(), **report.versions}
    return {"command": shlex.join(("sparsed", *arguments)), **plain, "versions": versions}


def quality_rows(report: EvaluationReport) -> Iterator[tuple[str | None, ...]]:
    """A row for each text and choice, under HEADERS."""
    for row in report.quality:
        gap = gap_closed(row, report.quality)
        is_dense = row.choice.method is RankMethod.DENSE
        at = RESIDENCIES.index(SHOWN_RESIDENCY)
        yield (
            row.text,
            row.choice.written(share=False),
            None if is_dense else share_in_words(row.choice.share),
            f"{row.perplexity:.3f}",
            f"{row.ratio:.4f}",
            f"{row.ratio_low:.4f} to {row.ratio_high:.4f}",
            f"{row.reads:.3f}",
            f"{row.metadata_bytes:.0f}",
            _fixed(row.recall_mean),
            _fixed(row.recall_p10),
            _fixed(row.recall_p01),
            _fixed(row.error_mean),
            None if row.locality is None else f"{row.locality.miss_fracs[at]:.2%}",
            None if gap is None else f"{gap:.0%}",
        )


def needle_headers(report: EvaluationReport) -> tuple[str, ...]:
    """The choice, then every length."""
    return ("needles found", "share", *(f"{length} tokens" for length in needle_lengths(report)))


def needle_rows(report: EvaluationReport) -> Iterator[tuple[str | None, ...]]:
    """A row for each choice: found of asked at each length, all depths together."""
    for choice in dict.fromkeys(score.choice for score in report.needles):
        scores = [score for score in report.needles if score.choice == choice]
        is_dense = choice.method is RankMethod.DENSE
        yield (
            choice.written(share=False),
            None if is_dense else share_in_words(choice.share),
            *(_found(scores, length) for length in needle_lengths(report)),
        )


def needle_lengths(report: EvaluationReport) -> tuple[int, ...]:
    """Lengths of needles, ascending."""
    return tuple(sorted({score.length for score in report.needles}))


def in_plain_words(report: EvaluationReport) -> str | None:
    """What the first choice that an engine could make costs, where it reads least; None if there
    is none."""
    real = [row for row in report.quality if row.choice.method not in _ENDS]
    if not real:
        return None
    name = real[0].choice.written(share=False)
    alike = [row for row in real if row.choice.written(share=False) == name]
    share = min(row.choice.share for row in alike)
    least = [row for row in alike if row.choice.share == share]
    costs = ", ".join(f"{_cost(row)} on {row.text}" for row in least)
    reads = max(row.reads for row in least)  # more than the share where pages are few
    return f"{name} at {share_in_words(share)} (reads {reads:.3f}): perplexity {costs}"


def share_in_words(share: float) -> str:
    """As a fraction where it is a simple one."""
    near = Fraction(share).limit_denominator(MAX_DENOMINATOR)
    return str(near) if abs(float(near) - share) < 1e-9 else f"{share:.4g}"


def _cost(row: Quality) -> str:
    percent = 100 * (row.ratio - 1)
    words = f"{abs(percent):.1f} % {'above' if percent > 0 else 'below'} dense"
    is_sure = not row.ratio_low <= 1 <= row.ratio_high
    return words if is_sure else f"{words} (may be chance)"


def _found(scores: Sequence[NeedleScore], length: int) -> str:
    here = [score for score in scores if score.length == length]
    found, asked = sum(score.num_found for score in here), sum(score.num_asked for score in here)
    return f"{found} of {asked}"


def _fixed(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
