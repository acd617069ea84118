"""Copy of page rows between two page stores, one of which may be pinned host memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

# For tests, and for an engine until a calibration says what its link wants.
DEFAULT_PROGRAMS = 32
DEFAULT_TILE_BYTES = 32 << 10
MIN_TILE_BYTES, MAX_TILE_BYTES = 8 << 10, 64 << 10
_WORD_BYTES = 4
_VECTOR_BYTES = 16
_WARP_BYTES = 2048  # 64 bytes a thread in flight; twice that where warps run out
_MAX_WARPS = 16


def copy_pages(
    dst_RX: Tensor,
    src_RX: Tensor,
    *,
    dst_rows_M: Tensor,
    src_rows_M: Tensor,
    count: Tensor | None = None,
    programs: int = DEFAULT_PROGRAMS,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> None:
    """Copy row ``src_rows[i]`` of ``src`` to row ``dst_rows[i]`` of ``dst``; skip negative sources.

    A CPU tensor beside a CUDA tensor must be pinned: the kernel reads or writes host memory
    through its own address, 16 bytes a load, in at most ``programs`` persistent programs that
    each keep ``tile_bytes`` in flight: what a link carries is bytes in flight over its delay, so
    more bytes a program means fewer programs taken from the work beside the copy.

    Shapes: dst (R, X...), src (R', X...), both contiguous, same dtype; dst_rows, src_rows (M,)
    int64 on the GPU if either store is; ``count`` a scalar int32 or int64 on the same device,
    read by the kernel: pairs from ``count`` on are left alone (None: all M are wanted). A row
    twice in dst_rows gets one of the two values.
    Units: ``tile_bytes`` a power of two from 8 to 64 KiB.
    Changes: dst, on the current stream.
    Errors: AssertionError on other shapes, on unpinned host memory, or if the bytes of a row or
    an address are no multiple of 16.
    Source: ours; the idea is FlashH2D of SparseServe, arXiv 2509.24626.
    """
    assert dst_RX.dtype == src_RX.dtype and dst_RX.shape[1:] == src_RX.shape[1:]
    assert dst_RX.is_contiguous() and src_RX.is_contiguous()
    assert dst_rows_M.shape == src_rows_M.shape and dst_rows_M.ndim == 1
    assert count is None or (count.numel() == 1 and not count.is_floating_point())
    if not (dst_RX.is_cuda or src_RX.is_cuda):
        reference.copy_pages(
            dst_RX, src_RX, dst_rows_M=dst_rows_M, src_rows_M=src_rows_M, count=count
        )
        return
    assert all(store.is_cuda or store.is_pinned() for store in (dst_RX, src_RX))
    assert dst_rows_M.is_cuda and src_rows_M.is_cuda and (count is None or count.is_cuda)
    _launch(
        dst_RX,
        src_RX,
        dst_rows_M=dst_rows_M,
        src_rows_M=src_rows_M,
        count=count,
        programs=programs,
        tile_bytes=tile_bytes,
    )


def _launch(
    dst_RX: Tensor,
    src_RX: Tensor,
    *,
    dst_rows_M: Tensor,
    src_rows_M: Tensor,
    count: Tensor | None,
    programs: int,
    tile_bytes: int,
) -> None:
    row_bytes = dst_RX[:1].nbytes
    addresses = dst_RX.data_ptr(), src_RX.data_ptr()
    assert all(number % _VECTOR_BYTES == 0 for number in (row_bytes, *addresses))
    assert dst_rows_M.dtype == src_rows_M.dtype and dst_rows_M.element_size() == 8
    assert dst_rows_M.is_contiguous() and src_rows_M.is_contiguous()
    assert MIN_TILE_BYTES <= tile_bytes <= MAX_TILE_BYTES and not tile_bytes & (tile_bytes - 1)
    row_words = row_bytes // _WORD_BYTES
    tile_words = min(triton.next_power_of_2(row_words), tile_bytes // _WORD_BYTES)
    tile_rows = tile_bytes // _WORD_BYTES // tile_words
    num_tiles = triton.cdiv(len(dst_rows_M), tile_rows) * triton.cdiv(row_words, tile_words)
    if num_tiles:
        _copy_kernel[(min(programs, num_tiles),)](
            *addresses,
            dst_rows_M,
            src_rows_M,
            dst_rows_M if count is None else count,
            len(dst_rows_M),
            HAS_COUNT=count is not None,
            ROW_WORDS=row_words,
            TILE_ROWS=tile_rows,
            TILE_WORDS=tile_words,
            num_warps=min(tile_bytes // _WARP_BYTES, _MAX_WARPS),
            enable_fp_fusion=True,
        )


@triton.jit
def _load_rows(
    dst_rows_M: tl.tensor, src_rows_M: tl.tensor, first: tl.int32, num_rows: tl.int32,
    TILE_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    index = first + tl.arange(0, TILE_ROWS)
    wanted = index < num_rows
    dst_row = tl.load(dst_rows_M + index, mask=wanted, other=0)
    return dst_row, tl.load(src_rows_M + index, mask=wanted, other=-1)


# One variant for every list of rows, wherever it begins: a CUDA graph cannot compile another.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["dst_rows_M", "src_rows_M", "count"],
)
def _copy_kernel(
    dst_address: tl.int64,
    src_address: tl.int64,
    dst_rows_M: tl.tensor,
    src_rows_M: tl.tensor,
    count: tl.tensor,
    num_rows: tl.int32,
    HAS_COUNT: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
) -> None:
    # A cast from an integer forgets the alignment, and with it the 16-byte loads.
    dst = tl.multiple_of(dst_address.to(tl.pointer_type(tl.int32)), 16)
    src = tl.multiple_of(src_address.to(tl.pointer_type(tl.int32)), 16)
    if HAS_COUNT:
        num_rows = tl.minimum(num_rows, tl.load(count).to(tl.int32))
    tiles_per_row: tl.constexpr = (ROW_WORDS + TILE_WORDS - 1) // TILE_WORDS
    num_tiles = tl.cdiv(num_rows, TILE_ROWS) * tiles_per_row
    begin, step = tl.program_id(0), tl.num_programs(0)
    first = begin // tiles_per_row * TILE_ROWS
    dst_row, src_row = _load_rows(dst_rows_M, src_rows_M, first, num_rows, TILE_ROWS)
    for tile in range(begin, num_tiles, step):
        words = tile % tiles_per_row * TILE_WORDS + tl.arange(0, TILE_WORDS)
        mask = (src_row >= 0)[:, None] & (words < ROW_WORDS)[None, :]
        target = dst + dst_row[:, None] * ROW_WORDS + words[None, :]
        source = src + src_row[:, None] * ROW_WORDS + words[None, :]
        # The next row numbers travel while the bytes of this tile do.
        first = (tile + step) // tiles_per_row * TILE_ROWS
        dst_row, src_row = _load_rows(dst_rows_M, src_rows_M, first, num_rows, TILE_ROWS)
        tl.store(target, tl.load(source, mask=mask), mask=mask)
