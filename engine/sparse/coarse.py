"""Two passes of scoring: the summaries of super-pages, then the pages of the best ones alone.

No engine ranks so: it is the measured alternative of ADR 9, timed by a benchmark; the evaluation has
one of its own (``engine.evaluate.rankers``).

A super-page is a run of neighbouring frames of a lane, hence of whole rows of the summaries. Its
own summary is made of those of its pages.

Shape legend: B requests, H KV heads, E summary width, N runs of pages, R and Y rows of a store,
X summaries of a row, F frames of a lane, C rows of a lane that hold super-pages, S super-pages
that are chosen, P pages of those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.kernels.score import score_pages


class Level(NamedTuple):
    """Summaries of one granularity, and where those of each lane lie.

    ``summaries_RXE`` and ``scales_RX`` are as ``kernels.score.score_pages`` takes them. ``rows``
    (B, H, number of rows of a lane) are in the order of the text; negative: absent.
    """

    summaries_RXE: Tensor
    rows: Tensor
    scales_RX: Tensor | None = None

    def score(self, query_BHE: Tensor, *, rows: Tensor) -> Tensor:
        """Scores (B, H, rows * X), float32, of the summaries in ``rows``."""
        return score_pages(query_BHE, self.summaries_RXE, rows_BHF=rows, scales_FX=self.scales_RX)


class Candidates(NamedTuple):
    """Pages left to select from: float32 scores, and int64 ids that differ within a lane."""

    scores_BHP: Tensor
    pages_BHP: Tensor


def super_summaries(
    summaries_NPE: Tensor, *, pages_per_super: int, extremes: bool = True
) -> Tensor:
    """Summaries of super-pages, from those of their pages, both [upper, lower].

    ``extremes``: largest upper, smallest lower; scores at least as high as each of the pages.
    Otherwise the mean of each.

    Shapes: summaries (N, P, E) in floating point, N runs of P neighbouring pages, P a multiple of
    ``pages_per_super``; returns (N, P / pages_per_super, E) in the same dtype.
    Errors: AssertionError on other shapes or dtypes.
    """
    _, num_pages, width = summaries_NPE.shape
    assert summaries_NPE.is_floating_point() and width % 2 == 0
    assert num_pages % pages_per_super == 0
    runs = summaries_NPE.reshape(-1, num_pages // pages_per_super, pages_per_super, width)
    if not extremes:
        return runs.mean(dim=2, dtype=torch.float32).to(summaries_NPE.dtype)
    upper, lower = runs.tensor_split(2, dim=-1)
    return torch.cat((upper.amax(dim=2), lower.amin(dim=2)), dim=-1)


def score_coarse_to_fine(
    query_BHE: Tensor, *, fine: Level, coarse: Level, num_full_B: Tensor, num_supers: int
) -> Candidates:
    """Scores of the pages of the ``num_supers`` best super-pages of each lane; the first one and
    that of the last full page are always among them. ``select_pages`` takes the result.

    The rows of ``fine`` are frames, those of ``coarse`` hold one super-page or several, each of
    the same number of frames: F is a multiple of C * X of ``coarse`` (add rows of -1).
    ``num_full_B`` (B,) int64 are full pages of each request, at least one. Summaries of pages past
    those may be anything, even NaN; so may that of the super-page with the last of them, which is
    chosen anyway: a summary is needed only once all its pages are full. Of a lane with fewer
    super-pages the rest of the candidates are pages that are not there. Waits for nothing on the
    host.

    Shapes: query (B, H, E), split as ``kernels.score.score_pages`` takes it; returns P =
    ``num_supers`` * pages of a super-page, by super-page, these in no order.
    Errors: AssertionError on other shapes, and unless ``num_supers`` is at least 2 (1, where
    there is no room for more) and at most what there is room for.
    """
    frame_pages, num_frames = fine.summaries_RXE.shape[1], fine.rows.shape[2]
    room = coarse.rows.shape[2] * coarse.summaries_RXE.shape[1]
    assert num_frames % room == 0 and min(2, room) <= num_supers <= room
    frames = num_frames // room
    pages_per_super = frames * frame_pages
    supers_BHS = select_pages(
        coarse.score(query_BHE, rows=coarse.rows),
        num_full_B=(num_full_B + (pages_per_super - 1)) // pages_per_super,
        count=num_supers,
    )
    chosen_BHSn = supers_BHS[..., None].expand(-1, -1, -1, frames)
    rows_BHSn = fine.rows.reshape(*fine.rows.shape[:2], room, frames).gather(2, chosen_BHSn)
    pages = torch.arange(pages_per_super, device=supers_BHS.device)
    return Candidates(
        fine.score(query_BHE, rows=rows_BHSn.flatten(2)),
        (supers_BHS[..., None] * pages_per_super + pages).flatten(2),
    )


def select_pages(
    scores_BHP: Tensor, *, num_full_B: Tensor, count: int, pages_BHP: Tensor | None = None
) -> Tensor:
    """The ``count`` best full pages of each lane, the first and the last full one always among
    them: page ids (B, H, count), int64, in no order.

    ``num_full_B`` is the number of full pages of each request, larger than ``count`` >= 2.
    ``pages_BHP`` are the ids of what was scored, None: all pages in order. With fewer than
    ``count`` full pages among them others make up the number.
    """
    if pages_BHP is None:
        ids = torch.arange(scores_BHP.shape[-1], device=scores_BHP.device)
    else:
        ids = pages_BHP
    last_B11 = num_full_B[:, None, None] - 1
    scores = scores_BHP.masked_fill((ids == 0) | (ids == last_B11), float("inf"))
    scores.masked_fill_(ids > last_B11, float("-inf"))
    chosen_BHK = scores.topk(count, dim=-1, sorted=False).indices
    return chosen_BHK if pages_BHP is None else pages_BHP.gather(-1, chosen_BHK)
