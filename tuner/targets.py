"""Whether a window of the profiler met its targets; pure."""

from __future__ import annotations

from sparsed.core import Slo, Snapshot


def breaks_target(snapshot: Snapshot, slo: Slo) -> bool:
    """Whether a figure of this window misses its target; a figure that is absent does not."""
    tpot_s, ttft_s, recall = snapshot.tpot_p95_s, snapshot.ttft_p95_s, snapshot.attention_recall
    return (
        (slo.tpot_s is not None and tpot_s is not None and tpot_s > slo.tpot_s)
        or (slo.ttft_s is not None and ttft_s is not None and ttft_s > slo.ttft_s)
        or (slo.min_recall is not None and recall is not None and recall < slo.min_recall)
    )
