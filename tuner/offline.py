"""The offline study: default first, a search and a random one at equal budget, then a verified winner or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from sparsed.core import (
    KnobValue,
    Measurement,
    Objective,
    SearchMethod,
    Slo,
    TrialResult,
    TrialStatus,
)
from sparsed.tuner.constrained import ConstrainedSearch
from sparsed.tuner.objective import TrialFailed, Verdict, judge, observe
from sparsed.tuner.policy import GridSearch, Observation, RandomSearch, SearchBackend
from sparsed.tuner.space import SearchSpace
from sparsed.tuner.stock import StockSearch

DEFAULT: Final = "default"
BAYES: Final = "bayes"
RANDOM: Final = "random"
ARMS: Final = {
    SearchMethod.CONSTRAINED: BAYES,
    SearchMethod.SKOPT: "skopt",
    SearchMethod.GRID: "grid",
    SearchMethod.RANDOM: RANDOM,
}
VERIFY: Final = "verify"
NUM_REPEATS: Final = 2  # measurements of a trial
NUM_VERIFY_ROUNDS: Final = 5
MAX_RECALL_LOSS: Final = 0.05  # below the default's recall, where no floor was given
BROKEN: Final = (
    TrialStatus.OUT_OF_MEMORY,
    TrialStatus.INVALID_CONFIG,
    TrialStatus.TIMEOUT,
    TrialStatus.ENGINE_ERROR,
)

Measure = Callable[[Mapping[str, KnobValue]], Measurement]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """``num_trials`` is the budget of each arm; a trial is ``num_repeats`` measurements."""

    space: SearchSpace
    objective: Objective
    slo: Slo
    num_trials: int
    seed: int
    method: SearchMethod = SearchMethod.CONSTRAINED
    num_repeats: int = NUM_REPEATS

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms in the order of their turns; random search is one always."""
        return tuple(dict.fromkeys((ARMS[self.method], RANDOM)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyOutcome:
    """``winner`` None: the default stays; ``reason`` says why in every case. ``best`` holds the
    best feasible trial of each arm. Scores are those of the verification rounds."""

    default: TrialResult | None
    best: Mapping[str, TrialResult]
    winner: TrialResult | None
    reason: str
    interrupted: bool = False
    default_scores: tuple[float, ...] = ()
    winner_scores: tuple[float, ...] = ()

    @property
    def default_ran(self) -> bool:
        """Whether there is anything to compare with."""
        return self.default is not None and self.default.status not in BROKEN


def run_study(
    measure: Measure,
    *,
    plan: StudyPlan,
    record: Callable[[TrialResult], None],
    previous: Sequence[TrialResult] = (),
) -> StudyOutcome:
    """Run ``plan`` to its end, or to Ctrl-C, which keeps what was measured.

    ``measure`` runs one window under the given knob values and raises ``TrialFailed`` if it
    cannot. ``record`` gets every trial as it ends. ``previous`` are the trials of the same study
    that an earlier run recorded: they count as done.
    """
    study = _Study(measure, plan=plan, record=record, previous=previous)
    try:
        if not study.measure_default():
            return study.outcome(f"the default configuration failed: {study.default.reason}")
        study.search()
        return study.verify()
    except KeyboardInterrupt:
        return study.outcome("interrupted before the verification ended", interrupted=True)


class _Study:
    """The trials so far; the steps append to them in order."""

    def __init__(
        self,
        measure: Measure,
        *,
        plan: StudyPlan,
        record: Callable[[TrialResult], None],
        previous: Sequence[TrialResult],
    ) -> None:
        self._measure = measure
        self._plan = plan
        self._record = record
        self._number = max((trial.number for trial in previous), default=-1) + 1
        done = (trial for trial in previous if trial.status is not TrialStatus.INTERRUPTED)
        self._trials = [trial for trial in done if trial.arm != VERIFY]
        self._slo = plan.slo

    @property
    def default(self) -> TrialResult:
        return next(trial for trial in self._trials if trial.arm == DEFAULT)

    def measure_default(self) -> bool:
        """Trial 0. False: it cannot run at all, so there is nothing to compare with."""
        if not any(trial.arm == DEFAULT for trial in self._trials):
            self._run(DEFAULT, self._plan.space.default_values)
        if self._slo.min_recall is None:
            # A default that reads everything has no sample and loses nothing. One that was never
            # sampled sets the same floor: too high rather than too low.
            recall = self.default.metrics.get("attention_recall", 1.0)
            self._slo = replace(self._slo, min_recall=recall - MAX_RECALL_LOSS)
        return self.default.status not in BROKEN

    def search(self) -> None:
        """All arms in turn, so that a drifting machine treats them alike."""
        space, seed = self._plan.space, self._plan.seed
        backends = {arm: _backend(arm, space=space, seed=seed) for arm in self._plan.arms}
        for turn in range(self._plan.num_trials):
            for arm, backend in backends.items():
                if len(self._of_arm(arm)) > turn:
                    continue  # done by an earlier run
                suggestion = backend.suggest(
                    [self._observe(trial) for trial in (self.default, *self._of_arm(arm))],
                    incumbent=space.default_values,
                    num_left=self._plan.num_trials - turn,
                )
                if suggestion is not None:
                    self._run(arm, suggestion.values)

    def verify(self) -> StudyOutcome:
        """Default and candidate again, in alternating order; the worst of one must beat the
        median of the other."""
        candidate = max(
            (trial for trial in self._trials if trial.score is not None),
            key=lambda trial: trial.score or 0.0,
            default=None,
        )
        if candidate is None:
            return self.outcome("no configuration met its targets; the default stays")
        if candidate.arm == DEFAULT:
            return self.outcome("nothing scored above the default; the default stays")
        rounds = [self._verify_round(candidate, turn) for turn in range(NUM_VERIFY_ROUNDS)]
        defaults = tuple(trial.score for trial, _ in rounds if trial.score is not None)
        winners = tuple(trial.score for _, trial in rounds if trial.score is not None)
        fault = _fault(defaults=defaults, winners=winners)
        return replace(
            self.outcome(fault or "verified: its worst run beat the median of the default"),
            winner=None if fault else candidate,
            default_scores=defaults,
            winner_scores=winners,
        )

    def outcome(self, reason: str, *, interrupted: bool = False) -> StudyOutcome:
        feasible = [trial for trial in self._trials if trial.score is not None]
        best: dict[str, TrialResult] = {}
        for trial in sorted(feasible, key=lambda trial: trial.score or 0.0):
            best[trial.arm] = trial
        return StudyOutcome(
            default=next((trial for trial in self._trials if trial.arm == DEFAULT), None),
            best=best,
            winner=None,
            reason=reason,
            interrupted=interrupted,
        )

    def _verify_round(self, candidate: TrialResult, turn: int) -> tuple[TrialResult, TrialResult]:
        order = [self.default, candidate] if turn % 2 == 0 else [candidate, self.default]
        results = {
            trial.arm: self._run(VERIFY, trial.values, num_repeats=1, note=f"of {trial.arm}")
            for trial in order
        }
        return results[DEFAULT], results[candidate.arm]

    def _observe(self, trial: TrialResult) -> Observation:
        return observe(trial, objective=self._plan.objective, slo=self._slo)

    def _of_arm(self, arm: str) -> list[TrialResult]:
        return [trial for trial in self._trials if trial.arm == arm]

    def _run(
        self,
        arm: str,
        values: Mapping[str, KnobValue],
        *,
        num_repeats: int | None = None,
        note: str = "",
    ) -> TrialResult:
        """One trial, recorded however it ends; Ctrl-C is recorded and raised again."""
        verdicts: list[Verdict] = []
        try:
            for _ in range(num_repeats or self._plan.num_repeats):
                verdicts.append(self._judge_once(values))
                if verdicts[-1].score is None:
                    break
        except KeyboardInterrupt:
            self._keep(arm, values, [_failed(TrialStatus.INTERRUPTED, "stopped by the user")], note)
            raise
        return self._keep(arm, values, verdicts, note)

    def _judge_once(self, values: Mapping[str, KnobValue]) -> Verdict:
        try:
            measurement = self._measure(values)
        except TrialFailed as error:
            return _failed(error.status, str(error))
        return judge(measurement, objective=self._plan.objective, slo=self._slo)

    def _keep(
        self, arm: str, values: Mapping[str, KnobValue], verdicts: Sequence[Verdict], note: str
    ) -> TrialResult:
        trial = summarize(verdicts, number=self._number, arm=arm, values=values, note=note)
        self._number += 1
        if arm != VERIFY:
            self._trials.append(trial)
        self._record(trial)
        return trial


def _backend(arm: str, *, space: SearchSpace, seed: int) -> SearchBackend:
    if arm == BAYES:
        return ConstrainedSearch(space=space, seed=seed)
    if arm == ARMS[SearchMethod.SKOPT]:
        return StockSearch(space=space, seed=seed)
    if arm == ARMS[SearchMethod.GRID]:
        return GridSearch(space=space, seed=seed)
    return RandomSearch(space=space, seed=seed)


def summarize(
    verdicts: Sequence[Verdict],
    *,
    number: int,
    arm: str,
    values: Mapping[str, KnobValue],
    note: str,
) -> TrialResult:
    """One row of repeated measurements: medians, and the spread of the scores. The last verdict
    decides: a repeat that fails ends the trial."""
    last = verdicts[-1]
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    feasible = last.status is TrialStatus.OK
    names = {name for verdict in verdicts for name in verdict.metrics}
    metrics = {
        name: median(v.metrics[name] for v in verdicts if name in v.metrics)
        for name in sorted(names)
    }
    score = median(scores) if feasible else None
    return TrialResult(
        number=number,
        arm=arm,
        values=dict(values),
        status=last.status,
        score=score,
        spread_frac=(max(scores) - min(scores)) / score if score and len(scores) > 1 else None,
        metrics=metrics,
        reason=last.reason or note,
    )


def _failed(status: TrialStatus, reason: str) -> Verdict:
    return Verdict(status=status, score=None, metrics={}, reason=reason)


def _fault(*, defaults: Sequence[float], winners: Sequence[float]) -> str | None:
    """Why the candidate is not verified; None if it is."""
    if len(winners) < NUM_VERIFY_ROUNDS:
        broken = NUM_VERIFY_ROUNDS - len(winners)
        return f"not verified: the best one broke its targets in {broken} runs; the default stays"
    if defaults and min(winners) <= median(defaults):
        return (
            f"not verified: its worst run ({min(winners):.4g}) does not beat the median of the "
            f"default ({median(defaults):.4g}); the default stays"
        )
    return None
