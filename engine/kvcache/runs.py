"""Pieces that lie beside each other on both sides, joined: a copy costs a submission each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """First row on each side and number of rows, of every run."""

    dst_R: Rows
    src_R: Rows
    length_R: Rows


class Side(NamedTuple):
    """Rows of a store in memory; no run may cross a multiple of ``chunk_rows`` (None: it may)."""

    address: int
    row_bytes: int
    chunk_rows: int | None = None


def merge_runs(
    dst_rows: Rows, src_rows: Rows, *, dst_chunk: int | None = None, src_chunk: int | None = None
) -> Runs:
    """Runs of rows that ascend by one on both sides; the order among them is that of their first
    rows in ``dst``. Rows with a negative source are left out. No row of ``dst`` may come twice.

    ``dst_chunk``, ``src_chunk``: rows of a registration of pinned memory, which a run must not
    cross.
    """
    wanted = src_rows >= 0
    dst, src = dst_rows[wanted], src_rows[wanted]
    order = np.argsort(dst, kind="stable")
    dst, src = dst[order], src[order]
    breaks = (np.diff(dst) != 1) | (np.diff(src) != 1)
    for rows, chunk in ((dst, dst_chunk), (src, src_chunk)):
        if chunk is not None:
            breaks |= np.diff(rows // chunk) != 0
    first = np.flatnonzero(np.concatenate(([True], breaks))) if len(dst) else np.arange(0)
    length = np.diff(np.append(first, len(dst)))
    return Runs(dst[first], src[first], length)


def addresses(runs: Runs, *, dst: Side, src: Side) -> tuple[list[int], list[int], list[int]]:
    """Target and source address and bytes of every run."""
    targets = dst.address + runs.dst_R * dst.row_bytes
    sources = src.address + runs.src_R * src.row_bytes
    return targets.tolist(), sources.tolist(), (runs.length_R * dst.row_bytes).tolist()
