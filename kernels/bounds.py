"""Summary of a full page: an upper and a lower bound of its keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

_TILE_DIMS = 64


def page_bounds(pages_MTCD: Tensor, *, minmax: bool) -> Tensor:
    """Upper and lower bound of the keys of each page, per dimension.

    ``minmax``: largest and smallest key. Otherwise the mean cuboid: center +- radius, where
    center = (max + min) / 2 and radius = mean over tokens of abs(k - center).

    Shapes: pages (M, T, 2, D) contiguous, every token valid; returns (M, 2, D) in the same
    dtype, upper bound first. Computed in float32.
    Errors: AssertionError on other shapes.
    Source: Quest, arXiv 2406.10774 (minmax); ArkVale, NeurIPS 2024 (mean cuboid).
    """
    assert pages_MTCD.is_contiguous() and pages_MTCD.ndim == 4 and pages_MTCD.shape[2] == 2
    run = _launch if pages_MTCD.is_cuda else reference.page_bounds
    return run(pages_MTCD, minmax=minmax)


def _launch(pages_MTCD: Tensor, *, minmax: bool) -> Tensor:
    num_pages, page_size, _, head_dim = pages_MTCD.shape
    bounds_M2D = torch.empty_like(pages_MTCD[:, 0])
    if num_pages:
        _bounds_kernel[(num_pages, triton.cdiv(head_dim, _TILE_DIMS))](
            pages_MTCD,
            bounds_M2D,
            PAGE_SIZE=page_size,
            HEAD_DIM=head_dim,
            TILE_DIMS=_TILE_DIMS,
            MINMAX=minmax,
            enable_fp_fusion=True,
        )
    return bounds_M2D


@triton.jit
def _bounds_kernel(
    pages_MTCD: tl.tensor,
    bounds_M2D: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIMS: tl.constexpr,
    MINMAX: tl.constexpr,
) -> None:
    page = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, PAGE_SIZE)
    dims = tl.program_id(1) * TILE_DIMS + tl.arange(0, TILE_DIMS)
    mask = dims < HEAD_DIM
    first = pages_MTCD + page * (PAGE_SIZE * 2 * HEAD_DIM)
    keys = first + tokens[:, None] * (2 * HEAD_DIM) + dims[None, :]
    keys_TD = tl.load(keys, mask=mask[None, :], other=0.0).to(tl.float32)
    upper_D, lower_D = tl.max(keys_TD, axis=0), tl.min(keys_TD, axis=0)
    if not MINMAX:
        center_D = (upper_D + lower_D) / 2
        radius_D = tl.sum(tl.abs(keys_TD - center_D[None, :]), axis=0) / PAGE_SIZE
        upper_D, lower_D = center_D + radius_D, center_D - radius_D
    bounds = bounds_M2D + page * (2 * HEAD_DIM) + dims
    tl.store(bounds, upper_D.to(bounds_M2D.dtype.element_ty), mask=mask)
    tl.store(bounds + HEAD_DIM, lower_D.to(bounds_M2D.dtype.element_ty), mask=mask)
