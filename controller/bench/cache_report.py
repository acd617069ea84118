"""What ``sparsed bench cache`` prints and writes."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from sparsed import __version__
from sparsed.controller.bench.cache import CacheBench
from sparsed.controller.bench.plots import DOTS_PER_INCH, new_figure
from sparsed.core import WINDOW_STEPS, CachePolicy, CacheRow, QuotaRule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULT_FILE: Final = "result.json"
PLOT_FILE: Final = "misses.png"
_HEADERS: Final = (
    "resident",
    "policy",
    "quotas",
    "slots a lane",
    "hot GiB",
    "misses",
    "worst 1 %",
    "ms/token",
    "worst ms",
)
_AHEAD_HEADERS: Final = ("prefetched", "used", "prefetch ms", "wasted MB")
_STYLES: Final = {QuotaRule.EQUAL: "-", QuotaRule.UNEVEN: "--"}
_WIDTHS: Final = {CachePolicy.BUCKETED: 4.0}  # shows under the exact LRU, to which it is close
_COLOURS: Final = {
    CachePolicy.LRU: "#1f5f8b",
    CachePolicy.BUCKETED: "#9fd3a8",
    CachePolicy.BELADY: "#888888",
}


def to_plain(bench: CacheBench, *, arguments: Sequence[str]) -> dict[str, object]:
    """Everything as JSON data, with the command and the versions that made it."""
    report = asdict(bench.report)
    first_steps = report.pop("first_steps")
    recordings = [
        {
            "file": str(file),
            **asdict(recording.header),
            "num_steps": len(recording.ranked_SLR),
            "first_step": first_step,
        }
        for file, recording, first_step in zip(
            bench.files, bench.recordings, first_steps, strict=True
        )
    ]
    return {
        "command": shlex.join(("sparsed", *arguments)),
        "versions": {
            "sparsed": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "recordings": recordings,
        **report,
        "link": asdict(bench.link),
        "rows": [{**asdict(row), **asdict(bench.cost(row))} for row in bench.report.rows],
    }


def headers(bench: CacheBench) -> tuple[str, ...]:
    return _HEADERS + (_AHEAD_HEADERS if bench.report.study.prefetch_pages else ())


def table_rows(bench: CacheBench) -> Iterator[tuple[str | None, ...]]:
    """A row for each cache, under ``headers``."""
    for row in bench.report.rows:
        cost = bench.cost(row)
        cells = (
            f"{row.residency:g}x",
            row.policy,
            row.quotas,
            _slots(row),
            f"{cost.hot_bytes / (1 << 30):.3f}",
            f"{row.miss_frac:.2%}",
            f"{row.worst_miss_frac:.2%}",
            f"{cost.miss_ms:.3f}",
            f"{cost.worst_miss_ms:.3f}",
        )
        yield cells + (_ahead(bench, row) if bench.report.study.prefetch_pages else ())


def remarks(bench: CacheBench) -> tuple[str, str]:
    """What no cache changes, and whose milliseconds those are."""
    report, link = bench.report, bench.link
    texts = ", ".join(recording.header.text for recording in bench.recordings)
    counted = (
        f"{report.num_steps} steps of {texts} counted, in each {report.num_lanes} lanes of "
        f"{report.mean_selected_pages:.0f} pages of {report.study.page_size} tokens: "
        f"{report.overlap_frac:.1%} selected in the step before as well, "
        f"{report.first_touch_frac:.2%} never before; {WINDOW_STEPS} steps together select "
        f"{report.window_ratio:.2f} times as many as one"
    )
    assumed = (
        f"ms/token: one request of {link.model}, {link.num_lanes} lanes, pages of "
        f"{link.page_bytes / 1024:g} KiB ({link.dtype}), over a link of {link.gb_per_s:g} GB/s"
    )
    return counted, assumed


def write_files(
    bench: CacheBench, directory: Path, *, arguments: Sequence[str]
) -> tuple[Path, ...]:
    """``result.json`` and ``misses.png``; OSError."""
    result, plot = directory / RESULT_FILE, directory / PLOT_FILE
    plain = to_plain(bench, arguments=arguments)
    result.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    _plot(bench).savefig(plot, dpi=DOTS_PER_INCH)
    return result, plot


def _slots(row: CacheRow) -> str:
    if row.min_slots == row.max_slots:
        return str(row.min_slots)
    return f"{row.min_slots} to {row.max_slots}"


def _ahead(bench: CacheBench, row: CacheRow) -> tuple[str | None, ...]:
    cost = bench.cost(row)
    return (
        f"{row.prefetched_frac:.2%}",
        None if row.used_frac is None else f"{row.used_frac:.1%}",
        f"{cost.prefetch_ms:.3f}",
        f"{cost.wasted_bytes / 1e6:.2f}",
    )


def _plot(bench: CacheBench) -> Figure:
    """Misses by size of the hot tier: the mean, and the worst steps."""
    link, study = bench.link, bench.report.study
    title = (
        f"{', '.join(recording.header.text for recording in bench.recordings)}: budget "
        f"{study.token_budget}, pages of {study.page_size}"
    )
    figure = new_figure(title, width=11, height=4.5)
    panels = {"mean of the steps": "miss_frac", "worst 1 % of the steps": "worst_miss_frac"}
    of_all_ms = link.time_ms(bench.report.mean_selected_pages)
    for axes, (words, field) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        _curves(axes, bench, field=field)
        axes.axhline(
            bench.report.first_touch_frac, color="#b03a2e", ls=":", label="first touched, mean"
        )
        axes.set_title(words, fontsize=9)
        axes.set_xlabel("resident pages per selected page")
        axes.set_ylabel("misses, share of selections")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, handlelength=4)
        right = axes.secondary_yaxis(
            "right", functions=(lambda frac: frac * of_all_ms, lambda ms: ms / of_all_ms)
        )
        right.set_ylabel(f"ms per token, {link.model}, {link.gb_per_s:g} GB/s")
    return figure


def _curves(axes: Axes, bench: CacheBench, *, field: str) -> None:
    """A line for each policy and quota, the widest below the others."""
    for policy in sorted(CachePolicy, key=lambda policy: -_WIDTHS.get(policy, 0)):
        for quotas, style in _STYLES.items():
            rows = [r for r in bench.report.rows if (r.policy, r.quotas) == (policy, quotas)]
            rows.sort(key=lambda row: row.residency)
            if rows:
                axes.plot(
                    [row.residency for row in rows],
                    [getattr(row, field) for row in rows],
                    marker=".",
                    ls=style,
                    lw=_WIDTHS.get(policy, 1.5),
                    color=_COLOURS[policy],
                    label=policy if quotas is QuotaRule.EQUAL else f"{policy}, {quotas}",
                )
