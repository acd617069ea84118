"""The offline study: default first, a search beside a random one, then a tested winner or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from sparsed.core import (
    AcceptanceWindow,
    DecisionState,
    KnobValue,
    Measurement,
    Objective,
    SearchMethod,
    Slo,
    TrialResult,
    WindowStage,
)
from sparsed.tuner.acceptance import WITHOUT_FIGURES, worth
from sparsed.tuner.beliefs import Prior, expect_nothing
from sparsed.tuner.benches import Benches, measure_on
from sparsed.tuner.candidates import pick_candidates
from sparsed.tuner.constrained import ConstrainedSearch, MemoryLimit
from sparsed.tuner.explain import explain
from sparsed.tuner.objective import OutOfTime, Verdict, judge, observe
from sparsed.tuner.policy import GridSearch, Observation, RandomSearch, SearchBackend
from sparsed.tuner.space import SearchSpace
from sparsed.tuner.stock import StockSearch
from sparsed.tuner.trials import NUM_REPEATS, Trials
from sparsed.tuner.verification import NUM_CANDIDATES, Comparison, Verification, offline_rule
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
FIRST: Final = 0  # of the devices
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
        return self.default is not None and self.default.status not in WITHOUT_FIGURES

    @property
    def default_scores(self) -> tuple[float, ...]:
        return _scores(self.comparison, of_candidate=False)

    @property
    def winner_scores(self) -> tuple[float, ...]:
        return _scores(self.comparison, of_candidate=True)


def run_study(
    benches: Benches,
    *,
    plan: StudyPlan,
    record: Callable[[TrialResult], None],
    record_window: Callable[[AcceptanceWindow], None],
    left_frac: Callable[[], float] = lambda: 1.0,
    previous: Sequence[TrialResult] = (),
) -> StudyOutcome:
    """Run ``plan`` to its end, or to Ctrl-C, which keeps what was measured.

    The default is the first trial, alone on the first of ``benches``. Then every device that is
    free gets a trial. The verification is on the first device that still works, with nothing
    running on the others.
    ``left_frac`` is the share of the time that is left. ``record`` gets every trial as it ends,
    ``record_window`` every window of the verification. ``previous`` are the trials of the same
    study that an earlier run recorded: they count as done.
    Errors: ``OutOfTime`` before the default was measured, without which there is no outcome.
    """
    study = _Study(benches, plan=plan, record=record, previous=previous)
    try:
        if not study.measure_default():
            return study.outcome(f"the default configuration failed: {study.default.reason}")
        study.search(left_frac)
        return study.verify(record_window)
    except KeyboardInterrupt:
        return study.outcome("interrupted before the verification", interrupted=True)


class _Proposal(NamedTuple):
    arm: str
    values: Mapping[str, KnobValue]


class _Study:
    """The steps of a study, over its trials."""

    def __init__(
        self,
        benches: Benches,
        *,
        plan: StudyPlan,
        record: Callable[[TrialResult], None],
        previous: Sequence[TrialResult],
    ) -> None:
        self._benches = benches
        self._plan = plan
        self._trials = Trials(
            benches,
            num_repeats=plan.num_repeats,
            judge=self._judge,
            record=record,
            previous=previous,
        )
        self._was_cut = False
        self._slo = plan.slo
        self._rule = offline_rule(objective=plan.objective, slo=plan.slo)

    @property
    def default(self) -> TrialResult:
        return next(trial for trial in self._trials.ended if trial.arm == DEFAULT)

    def measure_default(self) -> bool:
        """Trial 0. False: it cannot run at all, so there is nothing to compare with."""
        if not self._trials.of_arm(DEFAULT):
            with self._trials.kept_if_stopped():
                self._trials.begin(FIRST, DEFAULT, self._plan.space.default_values)
                self._trials.wait_for_all()
        if self._slo.min_recall is None:
            # A default that reads everything has no sample and loses nothing. One that was never
            # sampled sets the same floor: too high rather than too low.
            recall = self.default.metrics.get("attention_recall", 1.0)
            floor = recall / (1.0 + self._rule.max_loss_frac)
            self._slo = replace(self._slo, min_recall=floor)
        return self.default.status not in WITHOUT_FIGURES

    def search(self, left_frac: Callable[[], float]) -> None:
        """Trials on every device that is free, while there is time."""
        proposals = self._proposals(left_frac)
        try:
            with self._trials.kept_if_stopped():
                place: int | None = self._trials.wait_for_place()
                while place is not None:
                    place = self._begin_next(proposals, place)
                self._trials.wait_for_all()
        except OutOfTime:
            self._was_cut = True

    def _begin_next(self, proposals: Iterator[_Proposal], place: int) -> int | None:
        """Ask only now that the device is free, for whatever ended until now is known by now;
        returns the next one that is, None if nothing is left to try."""
        proposal = next(proposals, None)
        if proposal is None:
            return None
        self._trials.begin(place, proposal.arm, proposal.values)
        return self._trials.wait_for_place()

    def _proposals(self, left_frac: Callable[[], float]) -> Iterator[_Proposal]:
        """All arms in turn, so that a drifting machine treats them alike."""
        backends = {arm: _backend(arm, self._plan) for arm in self._plan.arms}
        for turn in range(self._plan.num_trials):
            for arm, backend in backends.items():
                if left_frac() <= 1.0 - SEARCH_TIME_FRAC:
                    self._was_cut = True
                    return
                if self._trials.num_begun(arm) > turn:
                    continue  # done by an earlier run
                if turn == 0 and arm == self._plan.arms[0] and self._plan.first is not None:
                    yield _Proposal(arm, self._plan.first)
                    continue
                suggestion = backend.suggest(
                    [self._observe(trial) for trial in (self.default, *self._trials.of_arm(arm))],
                    incumbent=self._plan.space.default_values,
                    num_left=self._plan.num_trials - turn,
                    pending=self._trials.pending(arm),
                )
                if suggestion is not None:
                    yield _Proposal(arm, suggestion.values)

    def verify(self, record: Callable[[AcceptanceWindow], None]) -> StudyOutcome:
        """What the search recommends, the next best and the default again, in other arrival
        orders; then the one whose worst run is the best against the default, in pairs."""
        if not any(trial.score is not None for trial in self._trials.ended):
            return self.outcome("no configuration met its targets; the default stays")
        candidates = self._candidates()
        if not candidates:
            cut = " in the time that the search had" if self._was_cut else ""
            return self.outcome(f"nothing is better than the default{cut}; the default stays")
        place = self._trials.first_sound
        self._benches.leave_only(place)
        verification = Verification(
            measure_on(self._benches, place),
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
        feasible = [trial for trial in self._trials.ended if trial.score is not None]
        best: dict[str, TrialResult] = {}
        for trial in sorted(feasible, key=lambda trial: trial.score or 0.0):
            best[trial.arm] = trial
        return StudyOutcome(
            default=next((trial for trial in self._trials.ended if trial.arm == DEFAULT), None),
            best=best,
            winner=None,
            reason=reason,
            interrupted=interrupted,
            trials=tuple(self._trials.ended),
            dropped_warm=self._has_dropped_warm(),
        )

    def _has_dropped_warm(self) -> bool:
        backend = _backend(self._plan.arms[0], self._plan)
        own = [
            self._observe(trial) for trial in self._trials.ended if trial.arm in (DEFAULT, BAYES)
        ]
        return isinstance(backend, ConstrainedSearch) and backend.has_dropped_warm(own)

    def _candidates(self) -> list[TrialResult]:
        """What the search recommends by all that was observed, and the next best."""
        incumbent = self._plan.space.default_values
        backend = _backend(self._plan.arms[0], self._plan)
        observed = [self._observe(trial) for trial in self._trials.ended]
        return pick_candidates(
            self._trials.ended,
            space=self._plan.space,
            default=self.default.values,
            recommended=backend.recommend(observed, incumbent=incumbent).values,
            keeps_limits=lambda trial: self._observe(trial).is_feasible,
            most=NUM_CANDIDATES,
        )

    def _observe(self, trial: TrialResult) -> Observation:
        return observe(trial, objective=self._plan.objective, slo=self._slo)

    def _judge(self, measurement: Measurement) -> Verdict:
        return judge(measurement, objective=self._plan.objective, slo=self._slo)


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
