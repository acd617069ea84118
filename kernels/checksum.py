"""A 64-bit checksum of page rows, in pinned host memory or on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

PROGRAMS = 64
_TILE_WORDS = 4096
_WORD_BYTES = 4
_VECTOR_BYTES = 16


def page_checksums(store_RX: Tensor, *, rows_M: Tensor) -> Tensor:
    """Checksum of each row ``rows[i]`` of ``store``: never 0, but for negative rows, which have 0.

    Every 32-bit word is mixed with its place in the row, so that words that changed places show
    as those that changed do; the mixed words are summed, so the order of summing does not matter.

    Shapes: store (R, X...) contiguous, pinned if it is a CPU tensor beside rows on a GPU; rows
    (M,) int64; returns (M,) int64 on the device of ``rows``.
    Errors: AssertionError on other shapes, or if the bytes of a row or the address are no
    multiple of 16.
    Source: ours; multipliers of xorshift64* (Vigna) and of Knuth's MMIX generator.
    """
    row_bytes = store_RX[:1].nbytes
    assert store_RX.is_contiguous() and rows_M.ndim == 1 and rows_M.dtype == torch.int64
    assert row_bytes % _VECTOR_BYTES == 0 and store_RX.data_ptr() % _VECTOR_BYTES == 0
    if not rows_M.is_cuda:
        return reference.page_checksums(store_RX, rows_M=rows_M)
    assert store_RX.is_cuda or store_RX.is_pinned()
    return _launch(store_RX, rows_M=rows_M.contiguous())


def _launch(store_RX: Tensor, *, rows_M: Tensor) -> Tensor:
    sums_M = torch.empty_like(rows_M)
    row_words = store_RX[:1].nbytes // _WORD_BYTES
    if len(rows_M):
        _checksum_kernel[(min(PROGRAMS, len(rows_M)),)](
            store_RX.data_ptr(),
            rows_M,
            sums_M,
            len(rows_M),
            ROW_WORDS=row_words,
            TILE_WORDS=min(triton.next_power_of_2(row_words), _TILE_WORDS),
            FIRST_MULTIPLIER=reference.FIRST_MULTIPLIER,
            SECOND_MULTIPLIER=reference.SECOND_MULTIPLIER,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return sums_M


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows_M"])
def _checksum_kernel(
    store_address: tl.int64,
    rows_M: tl.tensor,
    sums_M: tl.tensor,
    num_rows: tl.int32,
    ROW_WORDS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    FIRST_MULTIPLIER: tl.constexpr,
    SECOND_MULTIPLIER: tl.constexpr,
) -> None:
    # A cast from an integer forgets the alignment, and with it the 16-byte loads.
    store = tl.multiple_of(store_address.to(tl.pointer_type(tl.int32)), 16)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.load(rows_M + index)
        num_words = tl.where(row >= 0, ROW_WORDS, 0)
        total_W = tl.zeros([TILE_WORDS], dtype=tl.int64)
        for first in range(0, ROW_WORDS, TILE_WORDS):
            place_W = first + tl.arange(0, TILE_WORDS)
            mask = place_W < num_words
            word_W = tl.load(store + row * ROW_WORDS + place_W, mask=mask, other=0)
            mixed_W = (place_W.to(tl.int64) << 32) | (word_W.to(tl.int64) & 0xFFFFFFFF)
            mixed_W *= FIRST_MULTIPLIER
            mixed_W ^= (mixed_W >> 32) & 0xFFFFFFFF
            mixed_W *= SECOND_MULTIPLIER
            total_W += tl.where(mask, mixed_W, 0)
        total = tl.sum(total_W)
        total = tl.where(total == 0, 1, total)
        tl.store(sums_M + index, tl.where(row >= 0, total, 0))
