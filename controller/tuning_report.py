"""A study on the terminal: a bar with the best so far, a line per trial, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparsed.core import (
    AcceptanceWindow,
    KnobValue,
    Objective,
    SearchMethod,
    TrialResult,
    TrialStatus,
    WindowStage,
)
from sparsed.tuner.acceptance import worth
from sparsed.tuner.offline import (
    ARMS,
    BAYES,
    DEFAULT,
    RANDOM,
    StudyOutcome,
    StudyPlan,
)
from sparsed.tuner.verification import NUM_CANDIDATES, num_windows, offline_rule

UNITS: Final = {
    Objective.THROUGHPUT: "tokens/s",
    Objective.GOODPUT: "requests/s",
    Objective.LATENCY: "answers/s",
    Objective.BALANCED: "sqrt(tokens/s x answers/s)",
    Objective.CAPACITY: "tokens/s/GiB",
}
ARM_NAMES: Final = {
    DEFAULT: "default",
    RANDOM: "best of random",
    BAYES: "best of Bayesian",
    ARMS[SearchMethod.SKOPT]: "best of stock scikit-optimize",
    ARMS[SearchMethod.GRID]: "best of grid",
}


class StudyProgress:
    """A context manager; ``show`` gets every trial as it ends, ``show_window`` every window of
    the verification. A trial is shown with its device where there are several of ``devices``."""

    def __init__(
        self,
        console: Console,
        *,
        plan: StudyPlan,
        devices: Sequence[str],
        previous: Sequence[TrialResult],
    ) -> None:
        self._has_choice = len(devices) > 1
        self._objective = plan.objective
        self._rule = offline_rule(objective=plan.objective, slo=plan.slo)
        self._best = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        done = sum(trial.status is not TrialStatus.INTERRUPTED for trial in previous)
        total = 1 + len(plan.arms) * plan.num_trials
        total += num_windows(num_candidates=NUM_CANDIDATES, rule=self._rule)
        self._task = self._bar.add_task("tuning", total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, trial: TrialResult) -> None:
        unit = UNITS[self._objective]
        if trial.score is not None:
            self._best = max(self._best, trial.score)
        result = f"{trial.score:.4g} {unit}" if trial.score is not None else trial.status.value
        result += _recall_in_words(trial)
        note = f" ({trial.reason})" if trial.reason else ""
        knobs = values_in_words(trial.values)
        where = f"{trial.device}  " if self._has_choice else ""
        line = f"{trial.number:>4} {trial.arm:<8}{where}{result}{note}  {knobs}"
        self._bar.console.print(line, soft_wrap=True, highlight=False)
        self._bar.update(self._task, advance=1, description=f"best {self._best:.4g} {unit}")

    def show_window(self, window: AcceptanceWindow) -> None:
        score = worth(window, metric=self._rule.metric)
        result = f"{score:.4g} {UNITS[self._objective]}" if score else window.status.value
        what = "round" if window.stage is WindowStage.RANK else "pair"
        line = f"{window.stage.value:>9} {what} {window.round + 1:>2}  {result}  "
        line += values_in_words(window.values)
        self._bar.console.print(line, soft_wrap=True, highlight=False)
        self._bar.update(self._task, advance=1, description=f"verifying, {what} {window.round + 1}")


def print_outcome(console: Console, outcome: StudyOutcome, *, objective: Objective) -> None:
    """The default, the best of both arms, and the verification with its spreads."""
    table = Table("", f"{UNITS[objective]}", "spread", "knobs", title="result")
    for arm, name in ARM_NAMES.items():
        if trial := outcome.best.get(arm):
            spread = "" if trial.spread_frac is None else f"{trial.spread_frac:.1%}"
            table.add_row(name, f"{trial.score:.4g}", spread, values_in_words(trial.values))
    for name, scores in (
        ("default, again", outcome.default_scores),
        ("best, again", outcome.winner_scores),
    ):
        if scores:
            spread_frac = (max(scores) - min(scores)) / median(scores)
            runs = f"{len(scores)} runs, worst {min(scores):.4g}"
            table.add_row(name, f"{median(scores):.4g}", f"{spread_frac:.1%}", runs)
    console.print(table)
    console.print(outcome.reason)
    if outcome.winner is not None and outcome.winner.metrics.get("sparse_steps") == 0:
        console.print("note: it read every token, so nothing is known of its attention recall")


def values_in_words(values: Mapping[str, KnobValue]) -> str:
    pairs = values.items()
    return ", ".join(f"{name}={'auto' if value is None else value}" for name, value in pairs)


def _recall_in_words(trial: TrialResult) -> str:
    """What the floor was held against; a failed trial has no figures."""
    recall, num_sparse = (trial.metrics.get(name) for name in ("attention_recall", "sparse_steps"))
    if recall is not None:
        return f", recall {recall:.3f}"
    if num_sparse is None:
        return ""
    return ", recall not sampled" if num_sparse else ", nothing sparse"
