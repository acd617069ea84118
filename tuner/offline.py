"""The offline study: default first, a search beside a random one, then a tested winner or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from sparsed.core import (
    AcceptanceWindow,
    DecisionState,
    KnobValue,
    Objective,
    SearchMethod,
    Slo,
    TrialResult,
    TrialStatus,
    WindowStage,
)
from sparsed.tuner.acceptance import BROKEN, worth
from sparsed.tuner.beliefs import Prior, expect_nothing
from sparsed.tuner.candidates import pick_candidates
from sparsed.tuner.constrained import ConstrainedSearch, MemoryLimit
from sparsed.tuner.explain import explain
from sparsed.tuner.objective import OutOfTime, TrialFailed, Verdict, judge, observe
from sparsed.tuner.policy import GridSearch, Observation, RandomSearch, SearchBackend
from sparsed.tuner.space import SearchSpace
from sparsed.tuner.stock import StockSearch
from sparsed.tuner.verification import (
    NUM_CANDIDATES,
    Comparison,
    Measure,
    Verification,
    offline_rule,
)
from sparsed.tuner.warm import WarmStart

DEFAULT: Final = "default"
BAYES: Final = "bayes"
RANDOM: Final = "random"
ARMS: Final = {
    SearchMethod.CONSTRAINED: BAYES,
    SearchMethod.SKOPT: "skopt",
    SearchMethod.GRID: "grid",
    SearchMethod.RANDOM: RANDOM,
}
VERIFY: Final = "verify"  # studies of earlier versions kept such trials
NUM_REPEATS: Final = 2  # measurements of a trial
SEARCH_ORDER: Final = 0
SEARCH_TIME_FRAC: Final = 0.4  # of the time there is: a search without a test proves nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """``num_trials`` is the budget of each arm; a trial is ``num_repeats`` measurements.
    ``prior`` and ``memory``: what an analytic model of this machine says, for the constrained
    search; ``warm``: what a profile of another platform suggests to it. ``first``: values of a
    profile of this hardware and model, which the search of any method tries first."""

    space: SearchSpace
    objective: Objective
    slo: Slo
    num_trials: int
    seed: int
    method: SearchMethod = SearchMethod.CONSTRAINED
    num_repeats: int = NUM_REPEATS
    prior: Prior = expect_nothing
    memory: MemoryLimit | None = None
    warm: WarmStart | None = None
    first: Mapping[str, KnobValue] | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms in the order of their turns; random search is one always."""
        return tuple(dict.fromkeys((ARMS[self.method], RANDOM)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyOutcome:
    """``winner`` None: the default stays; ``reason`` says why in every case. ``best`` holds the
    best feasible trial of each arm. ``comparison`` None: there was nothing to decide. Scores are
    those of the test, of windows that kept their targets. ``trials`` are all of the study.
    ``dropped_warm``: the trials spoke against what a profile of elsewhere suggested."""

    default: TrialResult | None
    best: Mapping[str, TrialResult]
    winner: TrialResult | None
    reason: str
    interrupted: bool = False
    comparison: Comparison | None = None
    trials: tuple[TrialResult, ...] = ()
    dropped_warm: bool = False

    @property
    def default_ran(self) -> bool:
        """Whether there is anything to compare with."""
        return self.default is not None and self.default.status not in BROKEN

    @property
    def default_scores(self) -> tuple[float, ...]:
        return _scores(self.comparison, of_candidate=False)

    @property
    def winner_scores(self) -> tuple[float, ...]:
        return _scores(self.comparison, of_candidate=True)


def run_study(
    measure: Measure,
    *,
    plan: StudyPlan,
    record: Callable[[TrialResult], None],
    record_window: Callable[[AcceptanceWindow], None],
    left_frac: Callable[[], float] = lambda: 1.0,
    previous: Sequence[TrialResult] = (),
) -> StudyOutcome:
    """Run ``plan`` to its end, or to Ctrl-C, which keeps what was measured.

    ``measure`` runs one window of an arrival order under the given knob values; it raises
    ``TrialFailed`` if it cannot, and ``OutOfTime`` when no time is left. ``left_frac`` is the
    share of the time that is left. ``record`` gets every trial as it ends, ``record_window`` every
    window of the verification. ``previous`` are the trials of the same study that an earlier run
    recorded: they count as done.
    Errors: ``OutOfTime`` before the default was measured, without which there is no outcome.
    """
    study = _Study(measure, plan=plan, record=record, previous=previous)
    try:
        if not study.measure_default():
            return study.outcome(f"the default configuration failed: {study.default.reason}")
        study.search(left_frac)
        return study.verify(record_window)
    except KeyboardInterrupt:
        return study.outcome("interrupted before the verification", interrupted=True)


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
        self._was_cut = False
        self._slo = plan.slo
        self._rule = offline_rule(objective=plan.objective, slo=plan.slo)

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
            floor = recall / (1.0 + self._rule.max_loss_frac)
            self._slo = replace(self._slo, min_recall=floor)
        return self.default.status not in BROKEN

    def search(self, left_frac: Callable[[], float]) -> None:
        """All arms in turn, so that a drifting machine treats them alike, while there is time."""
        backends = {arm: _backend(arm, self._plan) for arm in self._plan.arms}
        try:
            for turn in range(self._plan.num_trials):
                for arm, backend in backends.items():
                    if left_frac() <= 1.0 - SEARCH_TIME_FRAC:
                        raise OutOfTime
                    self._try_next(arm, backend, turn=turn)
        except OutOfTime:
            self._was_cut = True

    def verify(self, record: Callable[[AcceptanceWindow], None]) -> StudyOutcome:
        """What the search recommends, the next best and the default again, in other arrival
        orders; then the one whose worst run is the best against the default, in pairs."""
        if not any(trial.score is not None for trial in self._trials):
            return self.outcome("no configuration met its targets; the default stays")
        candidates = self._candidates()
        if not candidates:
            cut = " in the time that the search had" if self._was_cut else ""
            return self.outcome(f"nothing is better than the default{cut}; the default stays")
        verification = Verification(
            self._measure,
            objective=self._plan.objective,
            slo=self._slo,
            rule=self._rule,
            record=record,
        )
        found = verification.run(self.default.values, [trial.values for trial in candidates])
        is_accepted = found.verdict.state is DecisionState.ACCEPTED
        words = explain(found.verdict, rule=self._rule)
        return replace(
            self.outcome(words if is_accepted else f"{words}; the default stays"),
            winner=next(trial for trial in candidates if trial.values == found.config_to)
            if is_accepted
            else None,
            interrupted=found.interrupted,
            comparison=found,
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
            trials=tuple(self._trials),
            dropped_warm=self._has_dropped_warm(),
        )

    def _has_dropped_warm(self) -> bool:
        backend = _backend(self._plan.arms[0], self._plan)
        own = [self._observe(trial) for trial in self._trials if trial.arm in (DEFAULT, BAYES)]
        return isinstance(backend, ConstrainedSearch) and backend.has_dropped_warm(own)

    def _candidates(self) -> list[TrialResult]:
        """What the search recommends by all that was observed, and the next best."""
        incumbent = self._plan.space.default_values
        backend = _backend(self._plan.arms[0], self._plan)
        observed = [self._observe(trial) for trial in self._trials]
        return pick_candidates(
            self._trials,
            space=self._plan.space,
            default=self.default.values,
            recommended=backend.recommend(observed, incumbent=incumbent).values,
            keeps_limits=lambda trial: self._observe(trial).is_feasible,
            most=NUM_CANDIDATES,
        )

    def _try_next(self, arm: str, backend: SearchBackend, *, turn: int) -> None:
        if len(self._of_arm(arm)) > turn:
            return  # done by an earlier run
        if turn == 0 and arm == self._plan.arms[0] and self._plan.first is not None:
            self._run(arm, self._plan.first)
            return
        suggestion = backend.suggest(
            [self._observe(trial) for trial in (self.default, *self._of_arm(arm))],
            incumbent=self._plan.space.default_values,
            num_left=self._plan.num_trials - turn,
        )
        if suggestion is not None:
            self._run(arm, suggestion.values)

    def _observe(self, trial: TrialResult) -> Observation:
        return observe(trial, objective=self._plan.objective, slo=self._slo)

    def _of_arm(self, arm: str) -> list[TrialResult]:
        return [trial for trial in self._trials if trial.arm == arm]

    def _run(self, arm: str, values: Mapping[str, KnobValue]) -> None:
        """One trial, recorded however it ends; what stopped it is recorded and raised again."""
        verdicts: list[Verdict] = []
        try:
            for _ in range(self._plan.num_repeats):
                verdicts.append(self._judge_once(values))
                if verdicts[-1].score is None:
                    break
        except (KeyboardInterrupt, OutOfTime) as error:
            by = "by the end of its time" if isinstance(error, OutOfTime) else "by the user"
            self._keep(arm, values, [_failed(TrialStatus.INTERRUPTED, f"stopped {by}")])
            raise
        self._keep(arm, values, verdicts)

    def _judge_once(self, values: Mapping[str, KnobValue]) -> Verdict:
        try:
            measurement = self._measure(values, SEARCH_ORDER)
        except TrialFailed as error:
            return _failed(error.status, str(error))
        return judge(measurement, objective=self._plan.objective, slo=self._slo)

    def _keep(self, arm: str, values: Mapping[str, KnobValue], verdicts: Sequence[Verdict]) -> None:
        trial = summarize(verdicts, number=self._number, arm=arm, values=values)
        self._number += 1
        self._trials.append(trial)
        self._record(trial)


def _backend(arm: str, plan: StudyPlan) -> SearchBackend:
    space, seed = plan.space, plan.seed
    if arm == BAYES:
        return ConstrainedSearch(
            space=space, seed=seed, prior=plan.prior, memory=plan.memory, warm=plan.warm
        )
    if arm == ARMS[SearchMethod.SKOPT]:
        return StockSearch(space=space, seed=seed)
    if arm == ARMS[SearchMethod.GRID]:
        return GridSearch(space=space, seed=seed)
    return RandomSearch(space=space, seed=seed)


def summarize(
    verdicts: Sequence[Verdict], *, number: int, arm: str, values: Mapping[str, KnobValue]
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
        reason=last.reason,
    )


def _scores(comparison: Comparison | None, *, of_candidate: bool) -> tuple[float, ...]:
    if comparison is None:
        return ()
    values = comparison.config_to if of_candidate else comparison.config_from
    found = (
        worth(window, metric=comparison.rule.metric)
        for window in comparison.windows
        if window.stage is WindowStage.TEST and window.values == values
    )
    return tuple(score for score in found if score)


def _failed(status: TrialStatus, reason: str) -> Verdict:
    return Verdict(status=status, score=None, metrics={}, reason=reason)
