"""What the daemon and the optimizer process tell each other: one JSON object a line."""

from __future__ import annotations

from dataclasses import dataclass

from sparsed.core import (
    Decision,
    RolloutRecord,
    Slo,
    Snapshot,
    TrialResult,
    UnprovedProfile,
    Verdict,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveContext:
    """One question. ``windows``: consecutive, oldest first, all under the same knobs;
    ``trials``: of one study of this hardware and model, maybe none. ``verdict``: what binds in
    these windows; ``failed``: candidates that are not to be tested again now; ``unproved``: what
    is to be tested before anything else. ``max_prefill_chunk``: as in ``RolloutRule``;
    ``pins``: knobs to leave alone. ``recall``: the mean of the newest samples under these knobs,
    None of too few: these windows alone may hold hardly any."""

    windows: tuple[Snapshot, ...]
    trials: tuple[TrialResult, ...]
    slo: Slo
    verdict: Verdict
    failed: tuple[RolloutRecord, ...] = ()
    unproved: UnprovedProfile | None = None
    max_prefill_chunk: int | None = None
    pins: frozenset[str] = frozenset()
    recall: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer; no ``values`` in the decision means hold."""

    decision: Decision
