"""Score of every page of a lane against the current query."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsed.kernels import reference

_TILE_PAGES = 16


def score_pages(
    query_BHE: Tensor,
    summaries_FXE: Tensor,
    *,
    rows_BHF: Tensor,
    scales_FX: Tensor | None = None,
) -> Tensor:
    """Largest dot product of the query with any key inside the bounds of each page.

    The query comes split, [max(q, 0), min(q, 0)], and a summary is [upper, lower]: their dot
    product is sum over d of max(q_d * upper_d, q_d * lower_d). A summary of 8 bits counts in
    steps of its page's scale: the score is scale * dot product.

    Shapes: query (B, H, E), E = 2 D; summaries (rows, X, E), one lane's X pages of one frame a
    row, any rows in any order; rows (B, H, F) int64, negative: absent; scales (rows, X) float16
    or float32, with summaries in int8 and only then; all contiguous. Returns (B, H, F * X)
    float32, in the order of the rows; pages of an absent row score -inf.
    Units: unscaled logits.
    Errors: AssertionError on other shapes or dtypes.
    Source: Quest, arXiv 2406.10774, per-page criticality estimate.
    """
    assert query_BHE.shape[:2] == rows_BHF.shape[:2] and rows_BHF.dtype == torch.int64
    assert query_BHE.shape[2] == summaries_FXE.shape[2]
    assert query_BHE.is_contiguous() and summaries_FXE.is_contiguous()
    assert rows_BHF.is_contiguous()
    assert (scales_FX is None) == summaries_FXE.is_floating_point()
    if scales_FX is not None:
        assert summaries_FXE.dtype == torch.int8 and scales_FX.is_contiguous()
        assert scales_FX.dtype in (torch.float16, torch.float32)
        assert scales_FX.shape == summaries_FXE.shape[:2]
    run = _launch if summaries_FXE.is_cuda else reference.score_pages
    return run(query_BHE, summaries_FXE, rows_BHF=rows_BHF, scales_FX=scales_FX)


def _launch(
    query_BHE: Tensor, summaries_FXE: Tensor, *, rows_BHF: Tensor, scales_FX: Tensor | None
) -> Tensor:
    num_requests, num_heads, num_frames = rows_BHF.shape
    frame_pages, width = summaries_FXE.shape[1:]
    num_pages = num_frames * frame_pages
    scores_BHP = query_BHE.new_empty((num_requests, num_heads, num_pages), dtype=torch.float32)
    if scores_BHP.numel():
        _score_kernel[(num_requests * num_heads, triton.cdiv(num_pages, _TILE_PAGES))](
            query_BHE,
            summaries_FXE,
            summaries_FXE if scales_FX is None else scales_FX,
            rows_BHF,
            scores_BHP,
            num_pages,
            FRAME_PAGES=frame_pages,
            WIDTH=width,
            PADDED_WIDTH=triton.next_power_of_2(width),
            TILE_PAGES=_TILE_PAGES,
            SCALED=scales_FX is not None,
            enable_fp_fusion=True,
        )
    return scores_BHP


@triton.jit(do_not_specialize=["num_pages"])
def _score_kernel(
    query_BHE: tl.tensor,
    summaries_FXE: tl.tensor,
    scales_FX: tl.tensor,
    rows_BHF: tl.tensor,
    scores_BHP: tl.tensor,
    num_pages: tl.int32,
    FRAME_PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    lane = tl.program_id(0).to(tl.int64)
    pages = tl.program_id(1) * TILE_PAGES + tl.arange(0, TILE_PAGES)
    columns = tl.arange(0, PADDED_WIDTH)
    frames = rows_BHF + lane * (num_pages // FRAME_PAGES) + pages // FRAME_PAGES
    row_P = tl.load(frames, mask=pages < num_pages, other=-1)
    place_P = row_P * FRAME_PAGES + pages % FRAME_PAGES
    start_P = place_P * WIDTH
    mask = (row_P >= 0)[:, None] & (columns < WIDTH)[None, :]
    bounds_PE = tl.load(summaries_FXE + start_P[:, None] + columns[None, :], mask=mask, other=0)
    query_E = tl.load(query_BHE + lane * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    score_P = tl.sum(bounds_PE.to(tl.float32) * query_E.to(tl.float32)[None, :], axis=1)
    if SCALED:
        score_P *= tl.load(scales_FX + place_P, mask=row_P >= 0, other=0.0).to(tl.float32)
    score_P = tl.where(row_P >= 0, score_P, float("-inf"))
    tl.store(scores_BHP + lane * num_pages + pages, score_P, mask=pages < num_pages)
