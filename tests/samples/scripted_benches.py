"""Devices whose windows a function serves, and which end in the order that a test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sparsed.core import KnobValue
from sparsed.tuner.benches import Ended, Measure
from sparsed.tuner.objective import TrialFailed


class ScriptedBenches:
    """``pick`` says which of the windows under way ends next, by its number in the order in which
    they began. ``begun`` holds (place, values, order) of all. A window is measured as it ends;
    what ``measure`` raises beside ``TrialFailed`` comes out of ``next_end``."""

    def __init__(
        self, measure: Measure, *, num_devices: int = 1, pick: Callable[[int], int] = lambda num: 0
    ) -> None:
        self.devices: Sequence[str] = [f"test:{number}" for number in range(num_devices)]
        self.begun: list[tuple[int, Mapping[str, KnobValue], int]] = []
        self.most_under_way = 0
        self.left_alone: int | None = None  # the place that ``leave_only`` was asked for
        self._measure = measure
        self._pick = pick
        self._under_way: dict[int, tuple[Mapping[str, KnobValue], int]] = {}  # by place

    def begin(self, place: int, values: Mapping[str, KnobValue], *, order: int) -> float:
        assert 0 <= place < len(self.devices) and place not in self._under_way
        assert self.left_alone in (None, place)
        self._under_way[place] = values, order
        self.begun.append((place, values, order))
        self.most_under_way = max(self.most_under_way, len(self._under_way))
        return float(len(self.begun))

    def next_end(self) -> Ended:
        assert self._under_way, "nobody would ever end"
        place = list(self._under_way)[self._pick(len(self._under_way))]
        values, order = self._under_way[place]
        try:
            ended = Ended(place, self._measure(values, order))
        except TrialFailed as error:
            ended = Ended(place, error)
        del self._under_way[place]
        return ended

    def end_all(self) -> None:
        self._under_way.clear()

    def leave_only(self, place: int) -> None:
        assert not self._under_way
        self.left_alone = place
