"""Which targets windows of the profiler meet and miss; pure.

TTFT and TPOT are those of the requests that ended in a window. Attention recall is sampled, one
layer of one request at a time, and differs most between layers: it is judged by the mean of many
samples, of as many windows as that takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sparsed.core import Guard, Slo, Snapshot

MIN_SAMPLES: Final = 8  # of attention recall: the mean of fewer says nothing
MAX_SAMPLES: Final = 64.0  # that the mean of the newest ones remembers

Guards = frozenset[Guard]
NOTHING: Final[Guards] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """The mean of the newest samples of attention recall: their sum and their number, both fading
    once there are more than ``MAX_SAMPLES``."""

    total: float = 0.0
    num: float = 0.0

    def grown(self, snapshot: Snapshot) -> Recall:
        """With the samples of one more window, maybe none."""
        if snapshot.attention_recall is None or not snapshot.recall_samples:
            return self
        total = self.total + snapshot.attention_recall * snapshot.recall_samples
        num = self.num + snapshot.recall_samples
        kept = min(1.0, MAX_SAMPLES / num)
        return Recall(total=kept * total, num=kept * num)

    @property
    def mean(self) -> float | None:
        """None of fewer than ``MIN_SAMPLES``."""
        return self.total / self.num if self.num >= MIN_SAMPLES else None


def guard_targets(slo: Slo) -> dict[Guard, float]:
    """The targets that were given, by the figure that they are for."""
    given = {Guard.TTFT: slo.ttft_s, Guard.TPOT: slo.tpot_s, Guard.QUALITY: slo.min_recall}
    return {guard: target for guard, target in given.items() if target is not None}


def told(snapshot: Snapshot, slo: Slo, *, recall: float | None = None) -> Guards:
    """The targets that this window tells of: requests ended in it, or it selected while ``recall``,
    the mean of the newest samples, is known."""
    figures = _figures(snapshot, recall)
    return frozenset(guard for guard in guard_targets(slo) if figures[guard] is not None)


def missed(snapshot: Snapshot, slo: Slo, *, recall: float | None = None) -> Guards:
    """The targets that this window misses; one that it does not tell of is not missed."""
    figures, targets = _figures(snapshot, recall), guard_targets(slo)
    return frozenset(guard for guard in targets if _misses(guard, figures[guard], targets[guard]))


def is_mostly_late(windows: Sequence[Snapshot], slo: Slo) -> bool:
    """Whether most of those windows that tell of a latency target miss one."""
    times = replace(slo, min_recall=None)
    tells = [bool(missed(one, times)) for one in windows if told(one, times)]
    return 2 * sum(tells) > len(tells)


def is_low(recall: float | None, slo: Slo) -> bool:
    """Whether a recall that is known is under the floor, if there is one."""
    return recall is not None and slo.min_recall is not None and recall < slo.min_recall


def mean_recall(windows: Sequence[Snapshot], *, least: int = 1) -> float | None:
    """Of all samples of these windows; None of fewer than ``least``."""
    sampled = [
        (one.attention_recall, one.recall_samples)
        for one in windows
        if one.attention_recall is not None
    ]
    num = sum(number for _, number in sampled)
    return sum(mean * number for mean, number in sampled) / num if num >= least else None


def has_selected(windows: Iterable[Snapshot]) -> bool:
    """Whether steps of these windows read less than every token."""
    return any(one.hot_hit_frac is not None for one in windows)


def _figures(snapshot: Snapshot, recall: float | None) -> Mapping[Guard, float | None]:
    return {
        Guard.TTFT: snapshot.ttft_p95_s,
        Guard.TPOT: snapshot.tpot_p95_s,
        Guard.QUALITY: recall if has_selected([snapshot]) else None,
    }


def _misses(guard: Guard, figure: float | None, target: float) -> bool:
    if figure is None:
        return False
    return figure < target if guard is Guard.QUALITY else figure > target
