"""Who may join the batch: three gates, and a queue in which nobody starves.

A request is admitted when working sets fit the hot tier, its frames fit the DRAM tier, and what all
would miss crosses the link in the time a token may take. Arrival decides; a small request may pass
a large one that does not fit yet, until that one has waited ``MAX_PASSED_S``.

Pages are of all lanes of a request. Source: SparseServe, arXiv 2509.24626, for the first gate; the
others and the ageing are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sparsed.core import MAX_PASSING, SparseMethod, WaitReason
from sparsed.engine.hit_curve import Learned, MissCurve
from sparsed.engine.kvcache.geometry import Geometry, num_frames

MAX_PASSED_S: Final = 2.0  # a request that has waited so long is passed by nobody


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What one request takes. ``mandatory_pages``: slots it cannot go without, which a prompt in
    progress needs exactly; ``working_set_pages``: what it uses within 12 steps, at least that;
    ``frames``: of its whole life. ``curve``: what it misses, by the slots it gets."""

    mandatory_pages: float
    working_set_pages: float
    frames: int
    curve: MissCurve


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What there is. ``hot_pages``: slots of the hot tier, taken ones included; ``free_frames`` and
    ``free_rows``: not taken. ``slack_pages``: pages that cross the link in a step before a token is
    late; None: not known yet."""

    hot_pages: int
    free_frames: int
    free_rows: int
    slack_pages: float | None = None


def mandatory_blocks(
    num_tokens: int, *, method: SparseMethod, token_budget: int, lane_blocks: int
) -> int:
    """Blocks of a lane that a request cannot go without: its selection and the partial page, or
    everything where attention is dense; all ``lane_blocks`` there are if it asks for more."""
    wanted = num_frames(num_tokens)
    if method is not SparseMethod.DENSE:
        wanted = min(wanted, num_frames(token_budget) + 1)
    return max(1, min(wanted, lane_blocks))


def expected_claim(
    num_tokens: int,
    *,
    method: SparseMethod,
    token_budget: int,
    geometry: Geometry,
    lane_blocks: int,
    learned: Learned,
) -> Claim:
    """What a request of ``num_tokens`` (prompt and output) would take that is like the others."""
    mandatory = mandatory_blocks(
        num_tokens, method=method, token_budget=token_budget, lane_blocks=lane_blocks
    )
    per_block = geometry.page_rows_per_frame
    pages, hot_pages = mandatory * per_block, lane_blocks * per_block
    total = float(num_frames(num_tokens) * per_block)
    selected = total
    if method is not SparseMethod.DENSE:
        selected = min(total, selected_pages(token_budget, geometry))
    return Claim(
        mandatory_pages=pages,
        working_set_pages=max(
            pages, learned.working_set(selected=selected, total=min(total, hot_pages))
        ),
        frames=num_frames(num_tokens),
        curve=learned.curve(slots=pages, selected=selected, total=total),
    )


def selected_pages(token_budget: int, geometry: Geometry) -> float:
    """Full pages that a step selects for one request, of all its lanes."""
    return float((token_budget // geometry.page_size - 1) * geometry.num_lanes)


Gate = Callable[[Sequence[Claim], Claim, Room], WaitReason | None]


def hot_gate(running: Sequence[Claim], candidate: Claim, room: Room) -> WaitReason | None:
    """Working sets fit, or the request is alone and has what it cannot go without."""
    used = sum(claim.working_set_pages for claim in running)
    need = candidate.working_set_pages if running else candidate.mandatory_pages
    return WaitReason.HOT_TIER if used + need > room.hot_pages else None


def dram_gate(running: Sequence[Claim], candidate: Claim, room: Room) -> WaitReason | None:
    """Frames of its whole life are free: nothing that runs ever has to give one up."""
    return WaitReason.DRAM_TIER if candidate.frames > room.free_frames else None


def link_gate(running: Sequence[Claim], candidate: Claim, room: Room) -> WaitReason | None:
    """What all would miss with the slots each would get fits the slack, or the request is alone."""
    if not running or room.slack_pages is None:
        return None
    late = expected_misses((*running, candidate), room) > room.slack_pages
    return WaitReason.LINK if late else None


GATES: Final[tuple[Gate, ...]] = (dram_gate, hot_gate, link_gate)


def expected_misses(claims: Sequence[Claim], room: Room) -> float:
    """Pages that these requests miss in a step if the hot tier is theirs alone: each gets its
    working set, and of what is left in proportion to it."""
    wanted = sum(claim.working_set_pages for claim in claims)
    scale = room.hot_pages / wanted if wanted else 1.0
    return sum(
        claim.curve.at(max(claim.mandatory_pages, scale * claim.working_set_pages))
        for claim in claims
    )


def check(
    running: Sequence[Claim], candidate: Claim, room: Room, *, gates: Sequence[Gate] = GATES
) -> WaitReason | None:
    """Why the candidate must wait; None: it may run beside those that do."""
    if room.free_rows < 1:
        return WaitReason.ACTIVE_LIMIT
    reasons = (gate(running, candidate, room) for gate in gates)
    return next((reason for reason in reasons if reason is not None), None)


class Picked(NamedTuple):
    """``place`` of the waiting request to be admitted, None: nobody may. ``reasons`` of those looked
    at before it, in their order."""

    place: int | None
    reasons: tuple[WaitReason, ...]


def pick(
    waited_s: Sequence[float],
    why: Callable[[int], WaitReason | None],
    *,
    max_passed_s: float = MAX_PASSED_S,
) -> Picked:
    """The oldest waiting request that may run, unless one before it has waited too long to be
    passed. ``waited_s``: of each, the oldest request first; ``why(i)`` as ``check`` says it."""
    reasons: list[WaitReason] = []
    for index, seconds in enumerate(waited_s[:MAX_PASSING]):
        reason = why(index)
        if reason is None:
            return Picked(index, tuple(reasons))
        reasons.append(reason)
        if reason is WaitReason.ACTIVE_LIMIT or seconds >= max_passed_s:
            others = WaitReason.TURN if reason is not WaitReason.ACTIVE_LIMIT else reason
            reasons += [others] * (min(len(waited_s), MAX_PASSING) - len(reasons))
            break
    return Picked(None, tuple(reasons))
