"""The best of a study measured again: ranked in other arrival orders, then tested in pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sparsed.core import (
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    Guard,
    KnobValue,
    Measurement,
    Objective,
    Slo,
    TrialStatus,
    WindowStage,
)
from sparsed.tuner.acceptance import WITHOUT_FIGURES, decide, worst_of
from sparsed.tuner.benches import Measure
from sparsed.tuner.objective import METRICS, OutOfTime, TrialFailed, judge, window_metrics
from sparsed.tuner.schedule import paired_slots, ranking_slots
from sparsed.tuner.targets import guard_targets

NUM_ROUNDS: Final = 5
NUM_CANDIDATES: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A candidate against the incumbent, decided or held."""

    config_from: Mapping[str, KnobValue]
    config_to: Mapping[str, KnobValue]
    rule: AcceptanceRule
    verdict: AcceptanceVerdict
    windows: tuple[AcceptanceWindow, ...]
    interrupted: bool = False


def offline_rule(*, objective: Objective, slo: Slo) -> AcceptanceRule:
    """Guards are the targets that were given, errors, and quality where no floor was given: a
    floor says what may be lost of it, and a target what latency is good enough."""
    targets = guard_targets(slo)
    times = [guard for guard in targets if guard is not Guard.QUALITY]
    quality = (Guard.QUALITY,) if slo.min_recall is None else ()
    return AcceptanceRule(
        metric=METRICS[objective],
        guards=(*times, Guard.ERRORS, *quality),
        targets=targets,
        num_rounds=NUM_ROUNDS,
    )


def num_windows(*, num_candidates: int, rule: AcceptanceRule) -> int:
    """Measurements of a verification that is not cut short, without those that are discarded."""
    return (1 + num_candidates) * rule.num_rounds + 2 * rule.num_pairs


class Verification:
    """Measures as the schedules say, and decides once, at the end.

    ``measure`` serves one window of an arrival order, 0 being the one of the search; it raises
    ``TrialFailed`` if the configuration breaks down and ``OutOfTime`` when there is no time left,
    which ends the verification, as Ctrl-C does. ``record`` gets each window that counts.
    ``slo`` has a floor of recall. The first of ``candidates`` is the best one so far.
    """

    def __init__(
        self,
        measure: Measure,
        *,
        objective: Objective,
        slo: Slo,
        rule: AcceptanceRule,
        record: Callable[[AcceptanceWindow], None],
    ) -> None:
        self._measure = measure
        self._objective = objective
        self._slo = slo
        self._rule = rule
        self._record = record
        self._windows: list[AcceptanceWindow] = []

    def run(
        self,
        incumbent: Mapping[str, KnobValue],
        candidates: Sequence[Mapping[str, KnobValue]],
    ) -> Comparison:
        best, interrupted = candidates[0], False
        try:
            self._rank([incumbent, *candidates])
            best = max(candidates, key=self._worst)
            if self._worst(best) > self._worst(incumbent):
                self._test(incumbent, best)
        except OutOfTime:
            pass  # what is missing is what the verdict goes by
        except KeyboardInterrupt:
            interrupted = True
        verdict = decide(self._windows, rule=self._rule, config_from=incumbent, config_to=best)
        return Comparison(
            config_from=incumbent,
            config_to=best,
            rule=self._rule,
            verdict=verdict,
            windows=tuple(self._windows),
            interrupted=interrupted,
        )

    def _worst(self, values: Mapping[str, KnobValue]) -> float:
        return worst_of(self._windows, values=values, rule=self._rule) or 0.0

    def _rank(self, configs: Sequence[Mapping[str, KnobValue]]) -> None:
        for turn, at in ranking_slots(len(configs), self._rule.num_rounds):
            window = self._window(configs[at], stage=WindowStage.RANK, turn=turn, order=1 + turn)
            self._keep(window)

    def _test(self, incumbent: Mapping[str, KnobValue], candidate: Mapping[str, KnobValue]) -> None:
        for slot in paired_slots(self._rule.num_pairs):
            window = self._window(
                candidate if slot.is_candidate else incumbent,
                stage=WindowStage.TEST,
                turn=slot.pair,
                order=1 + self._rule.num_rounds + slot.pair,
            )
            is_broken = window.status in WITHOUT_FIGURES
            if is_broken or not slot.is_discarded:
                self._keep(window)
            if is_broken:
                return

    def _window(
        self, values: Mapping[str, KnobValue], *, stage: WindowStage, turn: int, order: int
    ) -> AcceptanceWindow:
        try:
            measurement = self._serve(values, order)
        except TrialFailed as error:
            status, metrics = error.status, {}
        else:
            status = judge(measurement, objective=self._objective, slo=self._slo).status
            metrics = window_metrics(measurement, slo=self._slo)
        return AcceptanceWindow(
            number=len(self._windows),
            stage=stage,
            round=turn,
            order=order,
            values=dict(values),
            status=status,
            metrics=metrics,
        )

    def _serve(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
        """Once more where somebody killed the engine, which says nothing of ``values``."""
        try:
            return self._measure(values, order)
        except TrialFailed as error:
            if error.status is not TrialStatus.INTERRUPTED:
                raise
        return self._measure(values, order)

    def _keep(self, window: AcceptanceWindow) -> None:
        self._windows.append(window)
        self._record(window)
