"""Device memory by owner."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import HostGauges, MemoryPlan
from sparsed.profiler.occupancy import occupancy

SIZES = st.integers(0, 1 << 40)


def plan(*, hot_pages_bytes: int) -> MemoryPlan:
    return MemoryPlan(
        weights_bytes=99,
        hot_pages_bytes=hot_pages_bytes,
        summaries_bytes=3,
        tables_bytes=4,
        staging_bytes=5,
        prefill_buffer_bytes=6,
        dram_pool_bytes=1000,
        num_blocks=1,
        num_frames=1,
    )


@given(SIZES, SIZES, SIZES, SIZES)
def test_the_parts_of_the_engine_are_what_the_driver_counts_for_it(
    hot: int, weights: int, rest: int, others: int
) -> None:
    own = hot + 18 + weights + rest
    host = HostGauges(
        gpu_own_bytes=own,
        gpu_others_bytes=others,
        gpu_used_bytes=own + others,
        gpu_total_bytes=own + others + 7,
    )
    use = occupancy(plan(hot_pages_bytes=hot), host, weights_bytes=weights)
    assert (use.weights_bytes, use.rest_bytes, use.others_bytes) == (weights, rest, others)
    parts = (use.hot_pages_bytes, use.summaries_bytes, use.tables_bytes, use.staging_bytes)
    assert sum(parts) + use.prefill_buffer_bytes + weights + rest == own
    assert use.free_bytes == 7


@given(SIZES, SIZES)
def test_the_peak_is_never_under_what_the_driver_counts_now(told: int, own: int) -> None:
    host = HostGauges(gpu_own_bytes=own)
    use = occupancy(plan(hot_pages_bytes=1), host, weights_bytes=2, peak_bytes=told)
    assert use.peak_bytes == (max(told, own) or None)


def test_what_the_driver_does_not_tell_is_absent() -> None:
    use = occupancy(plan(hot_pages_bytes=1), HostGauges(), weights_bytes=2)
    assert (use.rest_bytes, use.others_bytes, use.free_bytes) == (None, None, None)
    assert use.peak_bytes is None


def test_a_driver_that_counts_less_leaves_no_rest() -> None:
    use = occupancy(plan(hot_pages_bytes=50), HostGauges(gpu_own_bytes=10), weights_bytes=2)
    assert use.rest_bytes == 0
