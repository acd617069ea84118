"""What a study may take is a hard cap."""

from __future__ import annotations

import asyncio

import pytest

from sparsed.controller.time_budget import TimeBudget
from sparsed.tuner.objective import OutOfTime


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


async def answer() -> int:
    return 7


def run(budget: TimeBudget, *, hangs: bool = False) -> tuple[int | None, list[str]]:
    """The result, None if it was cut off; and whether the work was begun and cleaned up."""
    events: list[str] = []

    async def work() -> int:
        events.append("begun")
        if hangs:
            await asyncio.Event().wait()
        return await answer()

    async def clean_up() -> None:
        events.append("cut")

    try:
        return asyncio.run(budget.within(work, on_cut=clean_up)), events
    except OutOfTime:
        return None, events


def test_shares_follow_the_clock() -> None:
    clock = Clock()
    budget = TimeBudget(10.0, clock=clock)
    assert (budget.left_s, budget.left_frac) == (10.0, 1.0)
    clock.now_s += 4.0
    assert (budget.left_s, budget.left_frac) == (6.0, pytest.approx(0.6))
    clock.now_s += 60.0
    assert (budget.left_s, budget.left_frac) == (0.0, 0.0)
    assert run(budget) == (None, [])


def test_without_an_end_there_is_always_time() -> None:
    clock = Clock()
    budget = TimeBudget(None, clock=clock)
    clock.now_s += 1e9
    assert budget.left_frac == 1.0
    assert run(budget) == (7, ["begun"])


def test_what_does_not_end_is_cut_off_and_cleaned_up() -> None:
    assert run(TimeBudget(10.0, clock=Clock())) == (7, ["begun"])
    assert run(TimeBudget(0.01, clock=Clock()), hangs=True) == (None, ["begun", "cut"])


def test_a_timeout_of_the_work_itself_is_not_the_end_of_the_time() -> None:
    async def slow() -> int:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            raise ValueError("its own deadline") from None
        return 0

    async def clean_up() -> None:
        raise AssertionError("nothing was cut off")

    with pytest.raises(ValueError, match="its own deadline"):
        asyncio.run(TimeBudget(60.0).within(slow, on_cut=clean_up))
