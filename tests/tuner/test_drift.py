"""Drift is seen where there is one, and nowhere else."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import serving

from sparsed.core import HostGauges, Platform, Slo
from sparsed.tuner.drift import (
    NUM_REFERENCE,
    SUSTAINED_S,
    Drift,
    LinkWatch,
    link_drift,
    version_drift,
    watch,
    watch_link,
)

SNAPSHOT = replace(serving.SNAPSHOT, ended_at=0.0, knobs=None)
WINDOW_S = 5.0
KNOBS = {"token_budget": 2048}
SLO = Slo(tpot_s=0.1)


class Load:
    """Windows of an engine whose tokens a busy second grow with the requests that run."""

    def __init__(self, seed: int = 0) -> None:
        self.draw = random.Random(seed)
        self.state = Drift()

    def serve(self, stretches: int, *, speed: float = 1.0, **kwargs: Any) -> Drift:
        for _ in range(stretches):
            running = self.draw.choice([2, 4, 8])
            for _ in range(int(WINDOW_S)):
                self.second(running, speed, **kwargs)
        return self.state

    def second(
        self,
        running: int,
        speed: float,
        *,
        regime_id: int | None = 1,
        knobs: Any = None,
        **figures: Any,
    ) -> None:
        busy_s = self.draw.uniform(0.3, 0.9)
        tokens = speed * busy_s * 40.0 * running**0.6 * math.exp(self.draw.gauss(0.0, 0.05))
        base = replace(SNAPSHOT, generated_tokens_per_s=tokens, step_s=busy_s, num_running=running)
        snapshot = replace(base, **figures)
        self.state = watch(
            self.state,
            snapshot,
            regime_id=regime_id,
            knobs=knobs or KNOBS,
            window_s=WINDOW_S,
            slo=SLO,
        )


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_load_that_varies_are_no_drift(seed: int) -> None:
    load = Load(seed)
    for _ in range(40):
        load.serve(50)
        assert not load.state.has_drifted
    assert load.state.loss_frac == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_less_is_seen_soon_and_ends_when_it_ends(seed: int) -> None:
    load = Load(seed)
    load.serve(NUM_REFERENCE + 20)
    assert load.serve(15, speed=0.8).has_drifted
    assert load.state.loss_frac == pytest.approx(0.2, abs=0.06)
    assert load.serve(1, speed=0.8).has_drifted
    assert not load.serve(60).has_drifted


def test_missed_targets_are_lost_goodput() -> None:
    load = Load()
    load.serve(NUM_REFERENCE + 5)
    assert load.serve(3, tpot_p95_s=0.2).has_drifted


def test_other_knobs_and_other_regimes_have_their_own_expectation() -> None:
    load = Load()
    load.serve(NUM_REFERENCE + 5)
    load.serve(NUM_REFERENCE + 20, speed=0.5, regime_id=2)
    load.serve(NUM_REFERENCE + 20, speed=0.5, knobs={"token_budget": 4096})
    assert not load.state.has_drifted
    assert not load.serve(40, speed=0.5, regime_id=2).has_drifted
    assert load.serve(20, speed=0.3, regime_id=2).has_drifted, "its expectation was kept"


def test_idle_stretches_and_unknown_loads_teach_nothing() -> None:
    load = Load()
    load.serve(NUM_REFERENCE + 5)
    before = {number: trail.reference for number, trail in load.state.trails.items()}
    load.serve(30, steps=0)
    load.serve(30, speed=0.1, regime_id=None)
    after = {number: trail.reference for number, trail in load.state.trails.items()}
    assert after == before and not load.state.has_drifted


@pytest.mark.parametrize("stay", [1, 2, 3, 7])
def test_evidence_adds_up_over_short_stays(stay: int) -> None:
    """No stay fills a stretch, and each load has its own running requests and expectation."""
    load = Load()

    def alternate(stretches: int, *, speed: float = 1.0) -> bool:
        drifted = False
        for _ in range(int(stretches * WINDOW_S / stay)):
            for regime_id, running in ((1, 2), (2, 8)):
                for _ in range(stay):
                    load.second(running, speed if regime_id == 1 else 1.0, regime_id=regime_id)
                drifted |= load.state.has_drifted and regime_id == 1
                assert not (load.state.has_drifted and regime_id == 2)
        return drifted

    assert not alternate(NUM_REFERENCE + 20)
    assert alternate(15, speed=0.8)


PLATFORM = Platform(pcie_generation=5, pcie_width=16, h2d_bytes_per_s=50e9)
FAST = replace(
    SNAPSHOT,
    h2d_bytes=20_000_000_000,
    h2d_gb_per_s=49.0,
    miss_bytes_per_step=3e8,
    host=HostGauges(pcie_generation=5, pcie_width=16),
)


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({}, None),
        ({"host": HostGauges(pcie_generation=3, pcie_width=16)}, "generation 3 with 16 lanes"),
        ({"host": HostGauges(pcie_generation=5, pcie_width=8)}, "8 lanes"),
        ({"host": HostGauges()}, None),
        ({"h2d_gb_per_s": 44.0}, "44.0 GB/s, calibrated were 50.0"),
        ({"h2d_gb_per_s": 46.0}, None),
        ({"h2d_gb_per_s": 44.0, "miss_bytes_per_step": 1e7}, None),
        ({"h2d_bytes": 1000, "h2d_gb_per_s": 1.0}, None),
        ({"h2d_bytes": 0, "h2d_gb_per_s": None}, None),
    ],
)
def test_a_link_is_judged_under_load_alone(figures: dict[str, Any], words: str | None) -> None:
    state, snapshot = LinkWatch(), replace(FAST, **figures)
    for _ in range(int(SUSTAINED_S) - 1):
        state = watch_link(state, snapshot, platform=PLATFORM)
        assert link_drift(state, snapshot, platform=PLATFORM) is None
    state = watch_link(state, snapshot, platform=PLATFORM)
    found = link_drift(state, snapshot, platform=PLATFORM)
    assert (words in found) if words and found else found == words


def test_one_good_window_begins_the_count_anew() -> None:
    state, slow = LinkWatch(), replace(FAST, h2d_gb_per_s=20.0)
    for _ in range(int(SUSTAINED_S) - 1):
        state = watch_link(state, slow, platform=PLATFORM)
    state = watch_link(state, FAST, platform=PLATFORM)
    assert watch_link(state, slow, platform=PLATFORM) == LinkWatch(slow_s=1.0)
    assert watch_link(state, slow, platform=Platform()) == LinkWatch()


def test_versions_are_compared_where_both_are_known() -> None:
    before = {"torch": "2.11", "driver": "1", "cuda": "13"}
    assert version_drift(before, {"torch": "2.11", "driver": "1", "triton": "3"}) is None
    assert (
        version_drift(before, {"torch": "2.12", "driver": "2"})
        == "driver 1 -> 2, torch 2.11 -> 2.12"
    )
    assert version_drift({}, before) is None
    assert version_drift({"torch": "2.11.0+cu130"}, {"torch": "2.11.0"}) is None
