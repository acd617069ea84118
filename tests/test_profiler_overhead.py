"""The arithmetic of ``benchmarks/profiler_overhead.py``."""

from __future__ import annotations

import pytest
from profiler_overhead import cost, rate


def test_a_rate_lies_between_the_first_and_the_last_token_of_a_span() -> None:
    times = [0.0, 1.0, 1.5, 2.0, 9.0]
    assert rate(times, since_s=0.5, until_s=5.0) == pytest.approx(2.0)
    assert rate(times, since_s=3.0, until_s=10.0) == 0.0, "one token has no rate"


@pytest.mark.parametrize("lost", [0.0, 0.03])
def test_what_is_lost_is_found_beside_drift_and_noise(lost: float) -> None:
    turns = []
    for number in range(8):
        drift = [100 * (1 - 0.01 * block) for block in range(4)]
        order = (True, False, False, True) if number % 2 == 0 else (False, True, True, False)
        noise = 1 + 0.001 * (number - 3.5)
        turns.append(
            [
                (is_on, value * noise * (1 - lost if is_on else 1))
                for is_on, value in zip(order, drift, strict=True)
            ]
        )
    found = cost(turns)
    assert found["cost_frac"] == pytest.approx(lost, abs=1e-3)
    assert found["low_frac"] <= found["cost_frac"] <= found["high_frac"]
