"""Gates, the queue in which nobody starves, who is spilled, and the quality breaker."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import MAX_PASSING, WaitReason
from sparsed.engine.admission import (
    Claim,
    Room,
    check,
    dram_gate,
    expected_misses,
    hot_gate,
    pick,
)
from sparsed.engine.breaker import GOOD_SAMPLES, MARGIN, MAX_RAISES, Breaker, judge
from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.pace import DEFAULT_MULTIPLE, LEAST_SLACK, Pace
from sparsed.engine.preemption import (
    PRESSURE,
    SETTLE_STEPS,
    Held,
    pressure,
    victim,
    why_not_back,
)

ROOM = Room(hot_pages=1000, free_frames=50, free_rows=4)


def claim(
    working_set: float, *, mandatory: float | None = None, frames: int = 1, misses: float = 0.0
) -> Claim:
    """Misses do not change with the slots unless all pages have one."""
    curve = MissCurve(slots=10, misses=misses, exponent=1e-9, selected=1e6, total=1e9)
    return Claim(
        mandatory_pages=working_set / 2 if mandatory is None else mandatory,
        working_set_pages=working_set,
        frames=frames,
        curve=curve,
    )


claims = st.builds(
    lambda pages, share, frames, misses: claim(
        pages, mandatory=pages * share, frames=frames, misses=misses
    ),
    pages=st.integers(1, 900),
    share=st.floats(0.1, 1),
    frames=st.integers(1, 60),
    misses=st.floats(0, 50),
)


# -- gates ------------------------------------------------------------------------------------


@given(st.lists(claims, min_size=1, max_size=5), claims, st.floats(0, 100))
def test_who_is_admitted_fits_both_tiers_and_the_link(
    running: list[Claim], candidate: Claim, slack: float
) -> None:
    room = replace(ROOM, slack_pages=slack)
    reason = check(running, candidate, room)
    sets = sum(c.working_set_pages for c in (*running, candidate))
    late = expected_misses((*running, candidate), room) > slack
    fits = {
        WaitReason.DRAM_TIER: candidate.frames <= 50,
        WaitReason.HOT_TIER: sets <= 1000,
        WaitReason.LINK: not late,
    }
    assert (reason is None) == all(fits.values())
    assert reason is None or not fits[reason]


@given(claims)
def test_alone_a_request_needs_its_mandatory_pages_alone(candidate: Claim) -> None:
    room = replace(ROOM, hot_pages=int(candidate.mandatory_pages) + 1, slack_pages=0.0)
    assert check([], candidate, room) is (
        WaitReason.DRAM_TIER if candidate.frames > room.free_frames else None
    )


def test_gates_can_be_left_out_one_by_one() -> None:
    large = claim(900, frames=51)
    assert check([claim(900)], large, ROOM) is WaitReason.DRAM_TIER
    assert check([claim(900)], large, ROOM, gates=(hot_gate,)) is WaitReason.HOT_TIER
    assert check([claim(900)], claim(900), ROOM, gates=(dram_gate,)) is None
    assert check([], claim(1), replace(ROOM, free_rows=0)) is WaitReason.ACTIVE_LIMIT


def test_misses_grow_as_a_newcomer_takes_its_share() -> None:
    def own(total: float) -> Claim:
        curve = MissCurve(slots=100, misses=8.0, exponent=1.0, selected=50, total=total)
        return Claim(mandatory_pages=50, working_set_pages=100, frames=1, curve=curve)

    room = replace(ROOM, hot_pages=400)
    assert expected_misses([own(9999)], room) == pytest.approx(2.0)
    assert expected_misses([own(9999)] * 4, room) == pytest.approx(4 * 8.0)
    assert expected_misses([own(9999)] * 8, room) == pytest.approx(8 * 16.0), "50 slots each"
    assert expected_misses([own(400)], room) == 0, "all its pages have a slot"


# -- the queue --------------------------------------------------------------------------------

reasons = st.sampled_from((None, WaitReason.HOT_TIER, WaitReason.LINK, WaitReason.DRAM_TIER))


@given(st.lists(st.tuples(st.floats(0, 5), reasons), max_size=30))
def test_nobody_passes_a_request_that_has_waited_long(
    queue: list[tuple[float, WaitReason | None]],
) -> None:
    queue = sorted(queue, key=lambda entry: -entry[0])
    picked = pick([seconds for seconds, _ in queue], lambda i: queue[i][1], max_passed_s=2.0)
    if picked.place is None:
        looked_at = queue[:MAX_PASSING]
        assert len(picked.reasons) == len(looked_at)
        first_old = next((i for i, (s, r) in enumerate(queue) if r and s >= 2), len(queue))
        assert all(reason for _, reason in looked_at[: first_old + 1])
    else:
        assert queue[picked.place][1] is None
        assert picked.reasons == tuple(reason for _, reason in queue[: picked.place])
        assert all(reason and s < 2 for s, reason in queue[: picked.place])


def test_those_behind_wait_for_their_turn() -> None:
    why = [WaitReason.LINK, None, WaitReason.HOT_TIER]
    assert pick([2.5, 1.0, 0.5], lambda i: why[i]).reasons == (
        WaitReason.LINK,
        WaitReason.TURN,
        WaitReason.TURN,
    )
    assert pick([1.5, 1.0, 0.5], lambda i: why[i]) == (1, (WaitReason.LINK,))
    full = pick([0.0, 0.0], lambda _i: WaitReason.ACTIVE_LIMIT)
    assert full == (None, (WaitReason.ACTIVE_LIMIT,) * 2)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=40), st.integers(0, 10**6))
def test_a_large_request_does_not_starve(sizes: list[int], seed: int) -> None:
    """Small requests arrive each second for ever; the large one is admitted in bounded time."""
    running: list[tuple[float, float]] = []  # pages, and when it ends
    waiting: list[tuple[float, float]] = [(900.0, 0.0)]  # pages, and when it came
    for second in range(100):
        running = [r for r in running if r[1] > second]
        waiting.append((100.0, float(second)))
        while True:
            now = [claim(pages) for pages, _ in running]
            answers = [check(now, claim(pages), ROOM) for pages, _ in waiting]
            picked = pick([second - came for _, came in waiting], answers.__getitem__)
            if picked.place is None:
                break
            pages, came = waiting.pop(picked.place)
            if pages == 900.0:
                assert second - came <= 2 + max(sizes)
                return
            running.append((pages, second + sizes[(second * 31 + seed) % len(sizes)]))
    raise AssertionError("the large request never ran")


# -- pace -------------------------------------------------------------------------------------


def test_slack_is_what_the_target_leaves() -> None:
    pace = Pace()
    assert pace.slack_s is None
    assert pace.slack_pages(bytes_per_s=1e9, page_bytes=1000) is None
    pace = pace.note(0.010, miss_s=0.0)
    assert pace.slack_s == pytest.approx((DEFAULT_MULTIPLE - 1) * 0.010)
    assert pace.slack_pages(bytes_per_s=1e9, page_bytes=1000) == pytest.approx(20_000)
    assert pace.slack_pages(bytes_per_s=None, page_bytes=1000) is None
    tight = Pace(target_s=0.008).note(0.010, miss_s=0.0)
    assert tight.slack_s == pytest.approx(LEAST_SLACK * 0.010), "a target below a step is no stop"
    for _ in range(300):
        pace = pace.note(0.050, miss_s=0.030)
    assert pace.step_s == pytest.approx(0.025), "half a step is its own at least"


# -- preemption -------------------------------------------------------------------------------

helds = st.builds(
    Held, claim=claims, changed_step=st.integers(0, 2 * SETTLE_STEPS)
)  # of a request in the order of admission


@given(st.lists(helds, max_size=6), st.integers(0, 3 * SETTLE_STEPS), st.floats(0, 100))
def test_the_newest_that_helps_is_spilled(running: list[Held], step: int, slack: float) -> None:
    room = replace(ROOM, slack_pages=slack)
    found = victim(running, room, step=step)
    if found is None:
        settled = [held for held in running[1:] if held.is_settled(step)]
        assert not settled or pressure([held.claim for held in running], room) is None
        return
    assert found > 0, "the oldest goes on"
    assert running[found].is_settled(step)
    assert pressure([held.claim for held in running], room) is not None
    newer = [i for i in range(found + 1, len(running)) if running[i].is_settled(step)]
    assert not any(_fit(running[:i] + running[i + 1 :], room) for i in newer)


def _fit(running: Sequence[Held], room: Room) -> bool:
    if len(running) < 2:
        return not running or running[0].claim.mandatory_pages <= room.hot_pages
    sets = sum(held.claim.working_set_pages for held in running)
    misses = expected_misses([held.claim for held in running], room)
    return sets <= room.hot_pages and (room.slack_pages is None or misses <= room.slack_pages)


def test_pressure_begins_above_what_fits_and_a_return_below_it() -> None:
    edge = 1000 * (1 + PRESSURE) / 2 / 2
    running = [claim(edge), claim(edge)]
    assert pressure(running, ROOM) is None
    spilled = Held(claim=running[1], changed_step=0)
    late = {"step": SETTLE_STEPS}
    assert why_not_back(running[:1], spilled, ROOM, **late) is WaitReason.HOT_TIER
    small = replace(spilled, claim=claim(1000 - edge))
    assert why_not_back(running[:1], small, ROOM, **late) is None
    assert why_not_back(running[:1], small, ROOM, step=1) is WaitReason.SPILLED
    assert why_not_back([], spilled, ROOM, step=1) is None, "nobody else needs the room"
    crowded = [claim(600, mandatory=600)] * 2
    assert pressure(crowded, ROOM) is WaitReason.HOT_TIER


@given(st.integers(0, 10**6))
def test_nobody_goes_and_comes_within_a_few_steps(seed: int) -> None:
    """Claims jump about in every step, and still each request changes seldom."""
    draw = random.Random(seed)
    changed, is_out, num_changes = [-SETTLE_STEPS] * 4, [False] * 4, 0
    for step in range(4 * SETTLE_STEPS):
        now = [claim(draw.uniform(1, 500)) for _ in range(4)]
        held = [Held(claim=now[i], changed_step=changed[i]) for i in range(4)]
        running = [i for i in range(4) if not is_out[i]]
        beside = [now[i] for i in running]
        place = victim([held[i] for i in running], ROOM, step=step)
        back = [i for i in range(4) if is_out[i]
                and why_not_back(beside, held[i], ROOM, step=step) is None]  # fmt: skip
        changing = running[place] if place is not None else back[0] if back else None
        if changing is not None:
            assert step - changed[changing] >= SETTLE_STEPS
            changed[changing], is_out[changing] = step, not is_out[changing]
            num_changes += 1
        assert not all(is_out)
    assert num_changes > 1


# -- breaker ----------------------------------------------------------------------------------


def run(samples: Sequence[float], *, floor: float = 0.5, own: int = 1024) -> list[Breaker]:
    states = [Breaker()]
    for recall in samples:
        states.append(judge(states[-1], recall, floor=floor, own_tokens=own, most_tokens=8192))
    return states


def test_low_recall_doubles_the_budget_and_then_goes_dense() -> None:
    budgets = [state.budget(1024, most_tokens=8192) for state in run([0.4] * MAX_RAISES)]
    assert budgets == [1024, 2048, 4096, 8192]
    assert [state.is_dense for state in run([0.4] * 5)] == [False] * 4 + [True] * 2
    assert [s.is_dense for s in run([0.4] * 2, own=8192)] == [False, True, True]
    assert run([0.0] * 9, floor=0.0)[-1] == Breaker(), "0 is off"


def test_a_raise_is_taken_back_only_after_many_good_samples() -> None:
    good, near = 0.5 + MARGIN, 0.5 + MARGIN / 2
    assert [s.raises for s in run([0.4] + [good] * GOOD_SAMPLES)][-2:] == [1, 0]
    assert run([0.4] + [good] * (GOOD_SAMPLES - 1) + [near] + [good])[-1].raises == 1
    assert run([good] * 3 + [0.4] + [good] * (GOOD_SAMPLES - 1))[-1].raises == 1, "counted anew"


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.05, 0.9), st.integers(256, 8192))
def test_the_breaker_moves_one_state_at_a_time(
    samples: list[float], floor: float, own: int
) -> None:
    states = run(samples, floor=floor, own=own)
    for recall, before, after in zip(samples, states, states[1:], strict=False):
        low, high = (s.budget(own, most_tokens=8192) for s in (before, after))
        assert own <= high <= max(own, 8192)
        if before.is_dense:
            assert after == before
        elif recall < floor:
            assert after.is_dense or high > low
        else:
            assert not after.is_dense and before.raises - 1 <= after.raises <= before.raises
