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
    """Keeps summaries of full pages, and selects pages by them and the queries of a step.

    Both tiers' page rows number the summaries; those of the spare frame may be written, and mean
    nothing. Nothing waits for the device, and all may be captured in a CUDA graph.

    Shape legend: M pages, T tokens of a page, C = 2 (key, value), D head dim, B requests, H KV
    heads, G query heads per KV head, K selected pages of the lane with most.
    """

    @property
    def store_bytes(self) -> int:
        """Bytes of all summaries: those of ``Geometry.summary_bytes_per_frame``, and of one frame
        more."""
        ...

    def summarise(self, pages_MTCD: Tensor, page_rows_M: Tensor) -> None:
        """Keep the summaries of full pages. ``page_rows_M`` int64; of a
        negative one nothing is kept."""
        ...

    def select(
        self,
        q_BHGD: Tensor,
        *,
        layer: int,
        rows_B: Tensor,
        num_full_B: Tensor,
        count_B: Tensor,
        max_pages: int,
        out_BHK: Tensor,
    ) -> None:
        """Write the ids of the ``count`` best of ``num_full`` pages of every lane, the sink page
        and the recent ones among them, in any order, then -1.

        Shapes: q (B, H, G, D) contiguous; rows, num_full, count (B,) int32, num_full at most
        ``max_pages``; out (B, H, K) int32, contiguous.
        """
        ...
