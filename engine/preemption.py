"""Which running request gives its hot pages up under pressure, and when one may come back.

A spilled request keeps its frames in the DRAM tier and loses no work. Two bands keep requests from
going and coming: one is spilled only where what runs is ``PRESSURE`` times what fits, and comes
back only where all fit; and none does either within ``SETTLE_STEPS`` of its last change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from sparsed.core import WaitReason
from sparsed.engine.admission import Claim, Gate, Room, hot_gate, link_gate

PRESSURE: Final = 1.1
SETTLE_STEPS: Final = 64
GATES: Final[tuple[Gate, ...]] = (hot_gate, link_gate)  # its frames it has for good


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A request with a row; ``changed_step`` of the engine: when it was admitted, spilled or
    brought back last."""

    claim: Claim
    changed_step: int

    def is_settled(self, step: int) -> bool:
        return step - self.changed_step >= SETTLE_STEPS


def pressure(
    claims: Sequence[Claim], room: Room, *, gates: Sequence[Gate] = GATES
) -> WaitReason | None:
    """The gate that these requests together have outgrown. Mandatory pages that do not fit are
    pressure at once: selections would be attended to in passes."""
    if sum(claim.mandatory_pages for claim in claims) > room.hot_pages:
        return WaitReason.HOT_TIER
    return _overrun(claims, _wider(room, PRESSURE), gates)


def victim(
    running: Sequence[Held], room: Room, *, step: int, gates: Sequence[Gate] = GATES
) -> int | None:
    """Which of ``running`` (in order of admission) to spill now; None: nobody.

    The newest one without which the others fit. If none alone suffices, the newest at all: the next
    step asks again. The oldest always stays.
    """
    claims = [held.claim for held in running]
    if len(running) < 2 or pressure(claims, room, gates=gates) is None:
        return None
    settled = [i for i in range(len(running) - 1, 0, -1) if running[i].is_settled(step)]
    for i in settled:
        if _overrun(claims[:i] + claims[i + 1 :], room, gates) is None:
            return i
    return settled[0] if settled else None


def why_not_back(
    running: Sequence[Claim],
    spilled: Held,
    room: Room,
    *,
    step: int,
    gates: Sequence[Gate] = GATES,
) -> WaitReason | None:
    """Why the spilled request must wait; None: it may come back."""
    if not running:
        return None
    if not spilled.is_settled(step):
        return WaitReason.SPILLED
    reasons = (gate(running, spilled.claim, room) for gate in gates)
    return next((reason for reason in reasons if reason is not None), None)


def _overrun(claims: Sequence[Claim], room: Room, gates: Sequence[Gate]) -> WaitReason | None:
    """The gate that the last of these would not pass beside the others, which is that all do."""
    if not claims:
        return None
    *others, last = claims
    reasons = (gate(others, last, room) for gate in gates)
    return next((reason for reason in reasons if reason is not None), None)


def _wider(room: Room, factor: float) -> Room:
    slack = room.slack_pages
    return replace(
        room,
        hot_pages=int(room.hot_pages * factor),
        slack_pages=None if slack is None else slack * factor,
    )
