"""The trials of a study: those that ended, and those under way, one a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from sparsed.core import KnobValue, Measurement, TrialResult, TrialStatus
from sparsed.tuner.benches import Benches
from sparsed.tuner.objective import OutOfTime, TrialFailed, Verdict

VERIFY: Final = "verify"  # studies of earlier versions kept such trials
NUM_REPEATS: Final = 2  # measurements of a trial
SEARCH_ORDER: Final = 0
FAULTS: Final = (TrialStatus.DEVICE_ERROR, TrialStatus.ENGINE_ERROR)
MAX_FAULTS: Final = 3  # in a row: then it is the device, and not what was tried on it


@dataclass(kw_only=True, slots=True)
class _Running:
    arm: str
    values: Mapping[str, KnobValue]
    started_at: float
    verdicts: list[Verdict] = field(default_factory=list)


class Trials:
    """Every measurement of a trial is on the device where it was begun. ``judge`` says what one is
    worth; ``record`` gets every trial as it ends, numbered in that order. ``previous`` are trials
    that an earlier run recorded: they count as done, unless they were interrupted. A device whose
    last ``MAX_FAULTS`` trials were ``FAULTS`` gets no more, as long as another one does better: a
    broken one would be through with the budget of all in no time."""

    def __init__(
        self,
        benches: Benches,
        *,
        num_repeats: int,
        judge: Callable[[Measurement], Verdict],
        record: Callable[[TrialResult], None],
        previous: Sequence[TrialResult],
    ) -> None:
        self._benches = benches
        self._num_repeats = num_repeats
        self._judge = judge
        self._record = record
        self._number = max((trial.number for trial in previous), default=-1) + 1
        done = (trial for trial in previous if trial.status is not TrialStatus.INTERRUPTED)
        self.ended = [trial for trial in done if trial.arm != VERIFY]
        self._running: dict[int, _Running] = {}  # by place
        self._faults = [0] * len(benches.devices)  # in a row, of each place

    def of_arm(self, arm: str) -> list[TrialResult]:
        """Those that ended."""
        return [trial for trial in self.ended if trial.arm == arm]

    def pending(self, arm: str) -> list[Mapping[str, KnobValue]]:
        """Values of those under way."""
        return [running.values for running in self._running.values() if running.arm == arm]

    def num_begun(self, arm: str) -> int:
        return len(self.of_arm(arm)) + len(self.pending(arm))

    def begin(self, place: int, arm: str, values: Mapping[str, KnobValue]) -> None:
        """A trial on a device that has none."""
        started_at = self._benches.begin(place, values, order=SEARCH_ORDER)
        self._running[place] = _Running(arm=arm, values=values, started_at=started_at)

    def wait_for_place(self) -> int:
        """The first device without a trial, once there is one."""
        while not (free := [place for place in self._sound_places() if place not in self._running]):
            self._take()
        return free[0]

    def wait_for_all(self) -> None:
        """Until no trial is under way."""
        while self._running:
            self._take()

    @contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """Within the block, Ctrl-C and the end of time end all trials that are under way; they are
        recorded as interrupted before either is raised again."""
        try:
            yield
        except (KeyboardInterrupt, OutOfTime) as error:
            self._benches.end_all()
            by = "by the end of its time" if isinstance(error, OutOfTime) else "by the user"
            for place, running in sorted(self._running.items()):
                self._keep(place, running, [failed(TrialStatus.INTERRUPTED, f"stopped {by}")])
            self._running.clear()
            raise

    @property
    def first_sound(self) -> int:
        """The first device that has not been given up; the first of all where every one has."""
        return self._sound_places()[0]

    def _sound_places(self) -> list[int]:
        """All of them where none is."""
        every = range(len(self._faults))
        return [place for place in every if self._faults[place] < MAX_FAULTS] or list(every)

    def _take(self) -> None:
        """The next measurement that ends; the last one of a trial ends it, and so does a bad one."""
        place, result = self._benches.next_end()
        running = self._running[place]
        if isinstance(result, TrialFailed):
            verdict = failed(result.status, str(result))
        else:
            verdict = self._judge(result)
        running.verdicts.append(verdict)
        if verdict.score is not None and len(running.verdicts) < self._num_repeats:
            self._benches.begin(place, running.values, order=SEARCH_ORDER)
            return
        del self._running[place]
        self._faults[place] = self._faults[place] + 1 if verdict.status in FAULTS else 0
        self._keep(place, running, running.verdicts)

    def _keep(self, place: int, running: _Running, verdicts: Sequence[Verdict]) -> None:
        trial = summarize(
            verdicts,
            number=self._number,
            arm=running.arm,
            values=running.values,
            device=self._benches.devices[place],
            started_at=running.started_at,
        )
        self._number += 1
        self.ended.append(trial)
        self._record(trial)


def summarize(
    verdicts: Sequence[Verdict],
    *,
    number: int,
    arm: str,
    values: Mapping[str, KnobValue],
    device: str,
    started_at: float,
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
        device=device,
        started_at=started_at,
    )


def failed(status: TrialStatus, reason: str) -> Verdict:
    """Of a measurement that gave no figures."""
    return Verdict(status=status, score=None, metrics={}, reason=reason)
