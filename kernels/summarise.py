"""Keeps the mean keys of full pages, in few bits of few dims, as ``kernels.mean_keys`` reads them.

Shape legend: M pages, T tokens of a page, C = 2 (key, value), D head dim, N lanes, R kept dims,
P pages of a frame, S rows of the store (lanes of frames), Y bytes of such a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference_mean_keys as reference
from sparsed.kernels.levels import MIN_SCALE, WHOLE
from sparsed.kernels.mean_keys import DIM_ALIGN, row_bytes

_CODE_ZERO = tl.constexpr(reference.CODE_ZERO)
_MAX_CODE = tl.constexpr(float(reference.MAX_CODE))
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_WHOLE = tl.constexpr(WHOLE)


def summarise_pages(
    pages_MTCD: Tensor,
    page_rows_M: Tensor,
    *,
    basis_NDR: Tensor,
    centre_ND: Tensor,
    pages_per_frame: int,
    store_SY: Tensor,
) -> None:
    """Keep the mean key of each page, less its lane's centre and in its lane's basis. The lane of
    a page row is ``row // P % N``; of a negative one nothing is kept, nor read. Of a page row that is
    given twice one page's codes stay, with any one's scale.

    Shapes: pages (M, T, 2, D) contiguous, every token valid; page rows (M,) int64; basis (N, D, R)
    and centre (N, D) float32, contiguous, R a multiple of 8; store (S, Y) uint8, Y as
    ``kernels.mean_keys.row_bytes`` says.
    Changes: store, on the current stream.
    Errors: AssertionError on other shapes or dtypes.
    Source: the mean key is ShadowKV's summary, arXiv 2410.21465; the low rank is ours.
    """
    num_lanes, head_dim, num_dims = basis_NDR.shape
    assert pages_MTCD.is_contiguous() and pages_MTCD.shape[2:] == (2, head_dim)
    assert page_rows_M.shape == pages_MTCD.shape[:1] and page_rows_M.dtype == torch.int64
    assert page_rows_M.is_contiguous() and num_dims % DIM_ALIGN == 0
    assert centre_ND.shape == (num_lanes, head_dim)
    assert basis_NDR.dtype == centre_ND.dtype == torch.float32
    assert basis_NDR.is_contiguous() and centre_ND.is_contiguous() and store_SY.is_contiguous()
    assert store_SY.dtype == torch.uint8
    assert store_SY.shape[1] == row_bytes(pages_per_frame, num_dims)
    run = _launch if pages_MTCD.is_cuda else reference.summarise_pages
    run(
        pages_MTCD,
        page_rows_M,
        basis_NDR=basis_NDR,
        centre_ND=centre_ND,
        pages_per_frame=pages_per_frame,
        store_SY=store_SY,
    )


def _launch(
    pages_MTCD: Tensor,
    page_rows_M: Tensor,
    *,
    basis_NDR: Tensor,
    centre_ND: Tensor,
    pages_per_frame: int,
    store_SY: Tensor,
) -> None:
    num_pages, page_size, _, head_dim = pages_MTCD.shape
    half_dims = basis_NDR.shape[2] // 2
    if num_pages:
        _summarise_kernel[(num_pages,)](
            pages_MTCD,
            page_rows_M,
            basis_NDR,
            centre_ND,
            store_SY,
            len(basis_NDR),
            PAGE_SIZE=page_size,
            HEAD_DIM=head_dim,
            PADDED_DIM=triton.next_power_of_2(head_dim),
            HALF_DIMS=half_dims,
            PADDED_HALF=triton.next_power_of_2(half_dims),
            PAGES=pages_per_frame,
            ROW_BYTES=store_SY.shape[1],
            enable_fp_fusion=True,
        )


@triton.jit(
    do_not_specialize=["num_lanes"], do_not_specialize_on_alignment=["pages_MTCD", "page_rows_M"]
)
def _summarise_kernel(
    pages_MTCD: tl.tensor,
    page_rows_M: tl.tensor,
    basis_NDR: tl.tensor,
    centre_ND: tl.tensor,
    store_SY: tl.tensor,
    num_lanes: tl.int32,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HALF_DIMS: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PAGES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
) -> None:
    m = tl.program_id(0).to(tl.int64)
    page_row = tl.load(page_rows_M + m)
    if page_row < 0:
        return
    row, place = page_row // PAGES, page_row % PAGES
    lane = row % num_lanes
    tokens, dims = tl.arange(0, PAGE_SIZE), tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    key_TD = pages_MTCD + m * PAGE_SIZE * 2 * HEAD_DIM + tokens[:, None] * 2 * HEAD_DIM + dims
    keys_TD = tl.load(key_TD, mask=is_dim[None, :], other=0.0).to(tl.float32)
    centre_D = tl.load(centre_ND + lane * HEAD_DIM + dims, mask=is_dim, other=0.0)
    mean_D = tl.sum(keys_TD, axis=0) / PAGE_SIZE - centre_D

    halves = tl.arange(0, PADDED_HALF)
    mask_DR = is_dim[:, None] & (halves < HALF_DIMS)[None, :]
    basis = basis_NDR + (lane * HEAD_DIM + dims)[:, None] * (2 * HALF_DIMS) + halves[None, :]
    low_R = tl.sum(mean_D[:, None] * tl.load(basis, mask=mask_DR, other=0.0), axis=0)
    basis += HALF_DIMS
    high_R = tl.sum(mean_D[:, None] * tl.load(basis, mask=mask_DR, other=0.0), axis=0)
    peak = tl.maximum(tl.max(tl.abs(low_R), axis=0), tl.max(tl.abs(high_R), axis=0))
    scale = tl.maximum((peak / _MAX_CODE).to(tl.float16).to(tl.float32), _MIN_SCALE)
    code_R = _code(low_R, scale) | (_code(high_R, scale) << 4)
    row_Y = store_SY + row * ROW_BYTES
    byte_R = (halves // 4 * PAGES + place) * 4 + halves % 4
    tl.store(row_Y + byte_R, code_R.to(tl.uint8), mask=halves < HALF_DIMS)
    scales_P = (row_Y + HALF_DIMS * PAGES).to(tl.pointer_type(tl.float16))
    tl.store(scales_P + place, scale.to(tl.float16))


@triton.jit
def _code(values_R: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Whole steps, halves to the even one, from 1 to 15."""
    steps_R = values_R / scale + _WHOLE - _WHOLE
    steps_R = tl.minimum(tl.maximum(steps_R, -_MAX_CODE), _MAX_CODE)
    return steps_R.to(tl.int32) + _CODE_ZERO
