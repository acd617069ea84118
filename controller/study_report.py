"""A study on paper: figures, data, and one page that opens anywhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

import msgspec

from sparsed.controller.study_plots import importance_png, pareto_png
from sparsed.controller.tuning_report import ARM_NAMES, UNITS, values_in_words
from sparsed.core import Objective, ProfileKey, Slo, TrialResult
from sparsed.tuner.offline import StudyOutcome

FORMAT_VERSION: Final = 1
PARETO_FILE: Final = "pareto.png"
IMPORTANCE_FILE: Final = "importance.png"
PAGE_FILE: Final = "report.html"
DATA_FILE: Final = "result.json"
TRIAL_HEAD: Final = ("", "arm", "device", "status", "score", "spread", "knobs", "why")
POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE: Final = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em;"
    "text-align:left}img{max-width:100%}"
)
EFFECTS: Final = (
    "Total effects by Jansen's estimator on the predictions of a Gaussian process that learned from "
    "the trials of both arms, infeasible ones as worse than the worst. Shares overlap where knobs "
    "act together. It says what mattered in the space that was searched, on this workload."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyReport:
    """All that is told of a study. ``importance``: total effect by knob. ``workload`` says what
    was served, in words."""

    study_id: int
    key: ProfileKey
    workload: str
    objective: Objective
    slo: Slo
    seed: int
    outcome: StudyOutcome
    importance: Mapping[str, float]
    versions: Mapping[str, str]


def write_report(report: StudyReport, directory: Path) -> tuple[Path, ...]:
    """Two figures, a page and a file of data; returns their paths. OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    pareto = pareto_png(report.outcome.trials, winner=report.outcome.winner)
    importance = importance_png(report.importance)
    page = render_page(report, pareto=pareto, importance=importance)
    files = {
        PARETO_FILE: pareto,
        IMPORTANCE_FILE: importance,
        PAGE_FILE: page.encode(),
        DATA_FILE: msgspec.json.format(msgspec.json.encode(to_plain(report))) + b"\n",
    }
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return tuple(directory / name for name in files)


def to_plain(report: StudyReport) -> dict[str, Any]:
    """The report as JSON data; seconds, tokens and bytes by the names of the metrics."""
    outcome = report.outcome
    found = outcome.comparison
    return {
        "format_version": FORMAT_VERSION,
        "study_id": report.study_id,
        "key": report.key,
        "workload": report.workload,
        "objective": report.objective,
        "unit": UNITS[report.objective],
        "slo": report.slo,
        "seed": report.seed,
        "versions": report.versions,
        "interrupted": outcome.interrupted,
        "reason": outcome.reason,
        "default": outcome.default and outcome.default.values,
        "winner": outcome.winner and outcome.winner.values,
        "default_scores": outcome.default_scores,
        "winner_scores": outcome.winner_scores,
        "verdict": found and found.verdict,
        "rule": found and found.rule,
        "importance": report.importance,
        "trials": outcome.trials,
    }


def render_page(report: StudyReport, *, pareto: bytes, importance: bytes) -> str:
    """HTML that asks for nothing else: no script, no network, the images within."""
    title = f"sparsed tune: {report.key.model} on {report.key.hardware}"
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f"<p><b>{escape(report.outcome.reason)}</b></p>",
            _table(_facts(report)),
            "<h2>Best of each arm</h2>",
            _table(_arms(report), head=("", UNITS[report.objective], "spread", "knobs")),
            "<h2>Latency over throughput</h2>",
            _image(pareto, "latency over throughput of every trial"),
            "<h2>Importance of the knobs</h2>",
            _image(importance, "effect of each knob"),
            f"<p>{EFFECTS}</p>",
            "<h2>Trials</h2>",
            _table(_trials(report), head=TRIAL_HEAD),
            "</body></html>\n",
        )
    )


def _facts(report: StudyReport) -> Iterator[tuple[object, ...]]:
    outcome, slo = report.outcome, report.slo
    yield "study", report.study_id
    yield "model", f"{report.key.model}, {report.key.dtype}"
    yield "hardware", report.key.hardware
    yield "workload", report.workload
    yield "objective", f"{report.objective.value}, {UNITS[report.objective]}"
    for name, target in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s)):
        if target is not None:
            yield f"target of {name}", f"{1e3 * target:g} ms"
    if outcome.default is not None:
        yield "default", values_in_words(outcome.default.values)
    yield "winner", values_in_words(outcome.winner.values) if outcome.winner else "none"
    if outcome.comparison is not None and outcome.comparison.verdict.p is not None:
        verdict = outcome.comparison.verdict
        yield "test", f"{verdict.num_pairs} pairs, p {verdict.p:.3g}"
    yield from ((f"{name} version", version) for name, version in report.versions.items())


def _arms(report: StudyReport) -> Iterator[tuple[object, ...]]:
    for arm, name in ARM_NAMES.items():
        if trial := report.outcome.best.get(arm):
            yield name, _score(trial), _spread(trial), values_in_words(trial.values)


def _trials(report: StudyReport) -> Iterator[tuple[object, ...]]:
    for trial in report.outcome.trials:
        knobs = values_in_words(trial.values)
        where = trial.arm, trial.device or "", trial.status.value
        yield trial.number, *where, _score(trial), _spread(trial), knobs, trial.reason


def _score(trial: TrialResult) -> str:
    return "" if trial.score is None else f"{trial.score:.4g}"


def _spread(trial: TrialResult) -> str:
    return "" if trial.spread_frac is None else f"{trial.spread_frac:.1%}"


def _table(rows: Iterable[tuple[object, ...]], *, head: tuple[str, ...] = ()) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(item)}</th>' for item in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{escape(str(x))}</td>' for x in row)}</tr>" for row in rows]
    return "\n".join(("<table>", *lines, "</table>"))


def _image(png: bytes, words: str) -> str:
    data = b64encode(png).decode()
    return f'<p><img alt="{escape(words)}" src="data:image/png;base64,{data}"></p>'
