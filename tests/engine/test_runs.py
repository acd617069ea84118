"""Runs of rows: every wanted row in one of them, none across a boundary."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparsed.engine.kvcache.runs import Side, addresses, merge_runs

Chunk = st.none() | st.integers(1, 6)


@given(
    dst=st.permutations(range(12)).flatmap(
        lambda rows: st.integers(0, 12).map(lambda count: rows[:count])
    ),
    steps=st.lists(st.sampled_from((1, 1, 1, 2, -1, -5)), min_size=12, max_size=12),
    dst_chunk=Chunk,
    src_chunk=Chunk,
)
def test_runs_are_the_rows_joined(
    dst: list[int], steps: list[int], dst_chunk: int | None, src_chunk: int | None
) -> None:
    dst = sorted(dst[:6]) + dst[6:]
    src = np.cumsum(steps[: len(dst)]).astype(np.int64)
    runs = merge_runs(np.array(dst, dtype=np.int64), src, dst_chunk=dst_chunk, src_chunk=src_chunk)
    expanded = [
        (d + i, s + i)
        for d, s, n in zip(*(x.tolist() for x in runs), strict=True)
        for i in range(n)
    ]
    assert sorted(expanded) == sorted(
        (d, s) for d, s in zip(dst, src.tolist(), strict=True) if s >= 0
    )
    for rows, chunk in ((runs.dst_R, dst_chunk), (runs.src_R, src_chunk)):
        if chunk is not None:
            assert (rows // chunk == (rows + runs.length_R - 1) // chunk).all()
    pairs = dict(expanded)
    for first_dst, first_src in zip(runs.dst_R.tolist(), runs.src_R.tolist(), strict=True):
        joinable = pairs.get(first_dst - 1) == first_src - 1
        at_boundary = (dst_chunk is not None and first_dst % dst_chunk == 0) or (
            src_chunk is not None and first_src % src_chunk == 0
        )
        assert not joinable or at_boundary, "as few runs as there can be"


def test_addresses_count_from_the_stores() -> None:
    runs = merge_runs(np.array([5, 6, 1]), np.array([2, 3, 9]))
    found = addresses(runs, dst=Side(1000, 16), src=Side(5000, 16))
    assert found == ([1016, 1080], [5144, 5032], [16, 32])
