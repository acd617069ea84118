"""The simulated study of the acceptance test, with few decisions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import acceptance_power
import pytest
from acceptance_power import ALONE, Scenario, binomial_interval, paired_verdict, run

from sparsed.core import DecisionState

NUM_DECISIONS = 150


@pytest.mark.parametrize("drift_is_steps", [False, True])
def test_without_an_effect_few_are_accepted(drift_is_steps: bool) -> None:
    scenario = Scenario(words=ALONE, effect_frac=0.0, drift_is_steps=drift_is_steps)
    row = run(scenario, num_decisions=NUM_DECISIONS, seed=1)
    assert row["accepted_frac"] <= 0.05
    assert row["accepted"] == row["reasons"].get("accepted", 0)


def test_most_true_gains_are_accepted_and_the_larger_the_more() -> None:
    found = [
        run(Scenario(words=ALONE, effect_frac=gain), num_decisions=NUM_DECISIONS, seed=1)
        for gain in (0.02, 0.05, 0.1)
    ]
    shares = [row["accepted_frac"] for row in found]
    assert shares == sorted(shares)
    assert shares[0] < 0.6
    assert shares[1] >= 0.8
    assert shares[2] >= 0.95


def test_a_loss_is_never_accepted() -> None:
    scenario = Scenario(words=ALONE, effect_frac=-0.05)
    verdicts = [paired_verdict(scenario, seed=str(number)) for number in range(40)]
    assert Counter(item.state for item in verdicts)[DecisionState.ACCEPTED] == 0


def test_the_interval_is_wilsons() -> None:
    """Of 10 in 100 by the formula: 5.5 % to 17.4 %."""
    low, high = binomial_interval(10, 100)
    assert (round(low, 4), round(high, 4)) == (0.0552, 0.1744)
    assert binomial_interval(0, 50).low == 0.0
    assert binomial_interval(50, 50).high == 1.0


def test_the_table_and_the_file_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "power.json"
    arguments = ["acceptance_power.py", "--decisions", "2", "--output", str(file)]
    monkeypatch.setattr("sys.argv", arguments)
    acceptance_power.main()
    rows = json.loads(file.read_text())["rows"]
    printed = capsys.readouterr().out.splitlines()
    assert len(rows) == len([line for line in printed if line.startswith("| ")]) - 1
    assert all(row["decisions"] == 2 for row in rows)
    assert len({(row["words"], row["effect_frac"]) for row in rows}) == len(rows)
