"""Whether a window of the profiler met its targets; pure."""

from __future__ import annotations

from collections.abc import Sequence

from sparsed.core import Slo, Snapshot


def misses_targets(windows: Sequence[Snapshot], slo: Slo) -> bool:
    """Whether most of those windows that tell of a target miss one."""
    told = [breaks_target(one, slo) for one in windows if tells_of_targets(one, slo)]
    return 2 * sum(told) > len(told)


def tells_of_targets(snapshot: Snapshot, slo: Slo) -> bool:
    """Whether this window has a figure that there is a target for: requests ended in it, or
    selected."""
    pairs = (
        (slo.tpot_s, snapshot.tpot_p95_s),
        (slo.ttft_s, snapshot.ttft_p95_s),
        (slo.min_recall, snapshot.attention_recall),
    )
    return any(target is not None and figure is not None for target, figure in pairs)


def breaks_target(snapshot: Snapshot, slo: Slo) -> bool:
    """Whether a figure of this window misses its target; a figure that is absent does not."""
    tpot_s, ttft_s, recall = snapshot.tpot_p95_s, snapshot.ttft_p95_s, snapshot.attention_recall
    return (
        (slo.tpot_s is not None and tpot_s is not None and tpot_s > slo.tpot_s)
        or (slo.ttft_s is not None and ttft_s is not None and ttft_s > slo.ttft_s)
        or (slo.min_recall is not None and recall is not None and recall < slo.min_recall)
    )
