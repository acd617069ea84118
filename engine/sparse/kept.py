"""What requests selected last, for tokens that do not rank anew.

Ranking costs a step time, and what it newly selects has to be fetched; from one token to the next
most of a selection stays. Within a page the knob ``retrieval_stride`` lets several tokens attend to
the pages of one ranking. These are pages, not slots: where they are is looked up in every step, so
that a request may lose, move and regain all of its slots in between.

Shape legend: L layers, R rows of the page tables, H KV heads, C columns, B requests, K selected
pages.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from sparsed.core import Knobs
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.row import Ranking, Row
from sparsed.engine.step_graphs import most_pages
from sparsed.kernels.keep import keep_pages


class KeptPages:
    """Lists of all lanes, in memory that is taken when they are first used, outside of a capture.
    ``is_on``: whether selections are kept, from the first stride above 1 on: whoever goes back to 1
    for a while, as a test does, need not begin anew."""

    def __init__(
        self, geometry: Geometry, *, num_rows: int, knobs: Knobs, device: torch.device
    ) -> None:
        self._page_size = geometry.page_size
        count = most_pages(page_size=geometry.page_size, max_tokens=knobs.max_model_len)
        self._shape = (geometry.num_layers, num_rows, geometry.num_kv_heads, count)
        self._device = device
        self.is_on = False
        self.apply(knobs)

    def apply(self, knobs: Knobs) -> None:
        """From the next token on."""
        self._stride = knobs.retrieval_stride
        self.is_on |= self._stride > 1

    def serves(self, row: Row, position: int) -> bool:
        """Whether the token at ``position`` attends to the pages that its row ranked last: as many,
        fewer than the stride ago, and no page has become full since."""
        ranking, page_size = row.ranking, self._page_size
        if ranking is None or ranking.num_pages != row.selected_pages(page_size):
            return False
        is_same_page = position // page_size == ranking.position // page_size
        return is_same_page and 0 < position - ranking.position < self._stride

    def note(self, row: Row, position: int) -> None:
        """The token at ``position`` ranks, and ``exchange`` gets what it selects."""
        row.ranking = Ranking(position, row.selected_pages(self._page_size))

    def exchange(
        self, layer: int, pages_BHK: Tensor, *, rows_B: Tensor, count_B: Tensor, keeps_B: Tensor
    ) -> None:
        """Keep what requests have ranked; those that keep get what they ranked last. As
        ``kernels.keep.keep_pages`` says."""
        kept_RHC = self._pages_LRHC[layer]
        keep_pages(pages_BHK, kept_RHC, rows_B=rows_B, count_B=count_B, keeps_B=keeps_B)

    @cached_property
    def _pages_LRHC(self) -> Tensor:
        return torch.full(self._shape, -1, dtype=torch.int32, device=self._device)
