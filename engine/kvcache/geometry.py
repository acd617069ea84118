"""Page arithmetic: sizes and addresses on both tiers, computed and never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sparsed.core import BLOCK_TOKENS, DTYPE_BYTES, ModelShape, SparseMethod

KEPT_DIMS: Final = 40  # of a page's mean key, four bits each
DIMS_OF_WORD: Final = 8
SCALE_BYTES: Final = 2  # float16
WORD_BYTES: Final = 4  # the mean keys of a lane and frame take whole ones


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Sizes of pages, blocks and frames for one model, dtype and page size.

    A *page row* numbers one page of one lane in the DRAM tier, and its summary in the hot tier:
    ``((frame * layers + layer) * heads + head) * pages_per_block + page % pages_per_block``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    element_bytes: int

    @classmethod
    def of(cls, shape: ModelShape, *, dtype: str, page_size: int) -> Geometry:
        return cls(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=page_size,
            element_bytes=DTYPE_BYTES[dtype],
        )

    @property
    def num_lanes(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def pages_per_block(self) -> int:
        return BLOCK_TOKENS // self.page_size

    @property
    def page_rows_per_frame(self) -> int:
        return self.num_lanes * self.pages_per_block

    @property
    def page_bytes(self) -> int:
        return self.page_size * 2 * self.head_dim * self.element_bytes

    @property
    def block_bytes(self) -> int:
        return self.page_bytes * self.pages_per_block

    @property
    def block_elements(self) -> int:
        return BLOCK_TOKENS * 2 * self.head_dim

    @property
    def frame_bytes(self) -> int:
        return self.block_bytes * self.num_lanes

    @property
    def layer_bytes(self) -> int:
        """One layer of a frame: its blocks lie one after the other."""
        return self.block_bytes * self.num_kv_heads

    @property
    def kept_dims(self) -> int:
        """Dims in which a page's mean key is kept: fewer than ``KEPT_DIMS`` in small heads."""
        return min(KEPT_DIMS, self.head_dim)

    @property
    def stored_dims(self) -> int:
        """``kept_dims``, and others that are 0: whole words."""
        return -(-self.kept_dims // DIMS_OF_WORD) * DIMS_OF_WORD

    def summary_bytes_per_frame(self, method: str) -> int:
        """Of a page the mean key in few dims of four bits and a scale, or two vectors of head_dim;
        nothing where no pages are ranked."""
        if method == SparseMethod.DENSE:
            return 0
        if method == SparseMethod.MEAN_KEY:
            row_bytes = self.pages_per_block * (self.stored_dims // 2 + SCALE_BYTES)
            return self.num_lanes * -(-row_bytes // WORD_BYTES) * WORD_BYTES
        return self.page_rows_per_frame * 2 * self.head_dim * self.element_bytes

    def max_pages(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` tokens touch, rounded up to whole frames."""
        return num_frames(num_tokens) * self.pages_per_block

    def table_bytes(self, num_rows: int, max_model_len: int, *, pool_frames: int) -> int:
        """All page tables, with the spare row and the spare frame."""
        rows_bytes = (num_rows + 1) * self.table_bytes_per_row(max_model_len)
        return rows_bytes + (pool_frames + 1) * self.table_bytes_per_frame

    def table_bytes_per_row(self, max_model_len: int) -> int:
        """Of one request, all int32: its frame ids, and of every lane the blocks, their number
        and two counts of demand."""
        frames = num_frames(max_model_len)
        return (frames + self.num_lanes * (frames + 3)) * 4

    @property
    def table_bytes_per_frame(self) -> int:
        """The slots of its pages, int32."""
        return self.page_rows_per_frame * 4


def num_frames(num_tokens: int) -> int:
    """Frames (and blocks of a lane) that ``num_tokens`` tokens need."""
    return -(-num_tokens // BLOCK_TOKENS)
