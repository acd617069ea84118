"""What the benchmark of regimes measured, and that it measures that."""

from __future__ import annotations

import json
from typing import Any

import pytest
import regimes
from recorded_curves import RESULTS

FIRST, SECOND = "long outputs", "interactive"


def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "regimes.json").read_text())["rows"]
    return found


@pytest.mark.slow
def test_two_loads_are_told_apart_and_each_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = (
        row
        for row in rows()
        if (row["first"], row["second"], row["seed"], row["phase_s"]) == (FIRST, SECOND, 0, 3600.0)
    )
    known = dict(zip((FIRST, SECOND), row["incumbents"], strict=True))
    monkeypatch.setattr(regimes, "find_incumbent", lambda name, *, seed: known[name])
    monkeypatch.setattr(regimes, "NUM_PHASES", 2)
    found = regimes.play(FIRST, SECOND, phase_s=3600.0, seed=1)
    assert (found.num_regimes, found.num_switches) == (2, 2)
    assert found.best_static == row["best_static"] and found.at_once == row["at_once"]
    assert found.ours > max(found.best_static, found.tuned_for_first, found.tuned_for_second)
    assert found.ours < found.at_once and found.num_wrong < 0.05 * found.num_windows


def test_long_phases_reach_what_the_incumbents_give() -> None:
    for row in rows():
        assert (row["num_regimes"], row["num_switches"]) == (2, 6)
        if row["phase_s"] >= 6 * 3600:
            assert row["ours"] >= 0.95 * row["at_once"]
    assert any(row["over_static"] >= regimes.TARGET_OVER_STATIC for row in rows())
