"""Copy of page rows between two page stores, one of which may be pinned host memory."""

import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

COPY_PROGRAMS = 32  # near the knee of PCIe 5: more of them slow the compute beside the copy
_WORD_BYTES = 4
_TILE_WORDS = 4096  # 16 KiB in flight a program
_VECTOR_BYTES = 16


def copy_pages(
    dst_RX: Tensor,
    src_RX: Tensor,
    *,
    dst_rows_M: Tensor,
    src_rows_M: Tensor,
    programs: int = COPY_PROGRAMS,
) -> None:
    """Copy row ``src_rows[i]`` of ``src`` to row ``dst_rows[i]`` of ``dst``; skip negative sources.

    A CPU tensor beside a CUDA tensor must be pinned: the kernel reads or writes host memory
    through its own address, 16 bytes a load, in at most ``programs`` persistent programs.

    Shapes: dst (R, X...), src (R', X...), both contiguous, same dtype; dst_rows, src_rows (M,)
    int64 on the GPU if either store is. A row twice in dst_rows gets one of the two values.
    Changes: dst, on the current stream.
    Errors: AssertionError on other shapes, on unpinned host memory, or if the bytes of a row or
    an address are no multiple of 16.
    Source: ours; the idea is FlashH2D of SparseServe, arXiv 2509.24626.
    """
    assert dst_RX.dtype == src_RX.dtype and dst_RX.shape[1:] == src_RX.shape[1:]
    assert dst_RX.is_contiguous() and src_RX.is_contiguous()
    assert dst_rows_M.shape == src_rows_M.shape and dst_rows_M.ndim == 1
    if not (dst_RX.is_cuda or src_RX.is_cuda):
        reference.copy_pages(dst_RX, src_RX, dst_rows_M=dst_rows_M, src_rows_M=src_rows_M)
        return
    assert all(store.is_cuda or store.is_pinned() for store in (dst_RX, src_RX))
    assert dst_rows_M.is_cuda and src_rows_M.is_cuda
    _launch(dst_RX, src_RX, dst_rows_M=dst_rows_M, src_rows_M=src_rows_M, programs=programs)


def _launch(
    dst_RX: Tensor, src_RX: Tensor, *, dst_rows_M: Tensor, src_rows_M: Tensor, programs: int
) -> None:
    row_bytes = dst_RX[:1].nbytes
    addresses = dst_RX.data_ptr(), src_RX.data_ptr()
    assert all(number % _VECTOR_BYTES == 0 for number in (row_bytes, *addresses))
    assert dst_rows_M.dtype == src_rows_M.dtype and dst_rows_M.element_size() == 8
    assert dst_rows_M.is_contiguous() and src_rows_M.is_contiguous()
    row_words = row_bytes // _WORD_BYTES
    tile_words = min(triton.next_power_of_2(row_words), _TILE_WORDS)
    tile_rows = _TILE_WORDS // tile_words
    num_rows = len(dst_rows_M)
    num_tiles = triton.cdiv(num_rows, tile_rows) * triton.cdiv(row_words, tile_words)
    if num_tiles:
        _copy_kernel[(min(programs, num_tiles),)](
            *addresses,
            dst_rows_M,
            src_rows_M,
            num_rows,
            ROW_WORDS=row_words,
            TILE_ROWS=tile_rows,
            TILE_WORDS=tile_words,
            num_warps=8,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _copy_kernel(
    dst_address: tl.int64,
    src_address: tl.int64,
    dst_rows_M: tl.tensor,
    src_rows_M: tl.tensor,
    num_rows: tl.int32,
    ROW_WORDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
) -> None:
    # A cast from an integer forgets the alignment, and with it the 16-byte loads.
    dst = tl.multiple_of(dst_address.to(tl.pointer_type(tl.int32)), 16)
    src = tl.multiple_of(src_address.to(tl.pointer_type(tl.int32)), 16)
    tiles_per_row: tl.constexpr = (ROW_WORDS + TILE_WORDS - 1) // TILE_WORDS
    num_tiles = tl.cdiv(num_rows, TILE_ROWS) * tiles_per_row
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        index = tile // tiles_per_row * TILE_ROWS + tl.arange(0, TILE_ROWS)
        words = tile % tiles_per_row * TILE_WORDS + tl.arange(0, TILE_WORDS)
        src_row = tl.load(src_rows_M + index, mask=index < num_rows, other=-1)
        dst_row = tl.load(dst_rows_M + index, mask=index < num_rows, other=0)
        mask = (src_row >= 0)[:, None] & (words < ROW_WORDS)[None, :]
        values = tl.load(src + src_row[:, None] * ROW_WORDS + words[None, :], mask=mask)
        tl.store(dst + dst_row[:, None] * ROW_WORDS + words[None, :], values, mask=mask)
