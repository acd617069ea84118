"""The interface of page selection methods, and what every selection holds."""

from __future__ import annotations

from typing import Final, Protocol

from torch import Tensor

SINK_PAGES: Final = 1  # first pages that are always read
RECENT_TOKENS: Final = 64  # newest tokens before the partial page that are always read


def recent_pages(page_size: int) -> int:
    """Newest full pages that are always read: at least one."""
    return max(1, RECENT_TOKENS // page_size)


class Selector(Protocol):
    """Keeps summaries of full pages, and estimates the attention to each from the queries of a
    step; ``kernels.select`` takes what it writes.

    Both tiers' page rows number the summaries; those of the spare frame may be written, and mean
    nothing. Nothing waits for the device, and all may be captured in a CUDA graph.

    Shape legend: M pages, T tokens of a page, C = 2 (key, value), D head dim, B requests, H KV
    heads, G query heads per KV head, V rows of logits per KV head, X columns (pages of all
    requests, one request after the other).
    """

    @property
    def store_bytes(self) -> int:
        """Bytes of all summaries: those of ``Geometry.summary_bytes_per_frame``, and of one frame
        more."""
        ...

    def num_scores(self, group: int) -> int:
        """Rows of logits per KV head, each of which votes: ``group``, its query heads, or 1 where
        these are scored as one."""
        ...

    def summarise(self, pages_MTCD: Tensor, page_rows_M: Tensor) -> None:
        """Keep the summaries of full pages. ``page_rows_M`` int64; of a
        negative one nothing is kept."""
        ...

    def estimate(
        self,
        q_BHGD: Tensor,
        *,
        layer: int,
        rows_B: Tensor,
        num_full_B: Tensor,
        first_B: Tensor,
        out_HVX: Tensor,
    ) -> None:
        """Write logits of each page: columns ``first`` to ``first + num_full - 1`` of ``out`` for
        each request; other columns stay as they are.

        Shapes: q (B, H, G, D) contiguous; rows, num_full, first (B,) int32; out (H, V, X) float32,
        contiguous.
        """
        ...
