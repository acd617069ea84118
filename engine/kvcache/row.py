"""One request's place in both tiers, and what its steps have read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsed.core import SparseMethod
from sparsed.engine.kvcache.lane_blocks import LaneBlocks


class Reads(NamedTuple):
    """What the decode steps of a request have attended to; see ``SparseDetails``.
    ``replayed_steps``: sparse ones that a recording selected for."""

    decode_steps: int = 0
    sparse_steps: int = 0
    replayed_steps: int = 0
    tokens_read: int = 0
    tokens_dense: int = 0


@dataclass(slots=True)
class Row:
    """One request's place in both tiers. Filled by KVCache; attention reads it and counts in it.

    ``complete`` means that page i sits in slot i of every lane, for all pages of every block that
    the request has reached; once a page has no slot it is false for good. Lanes of a complete row
    own equal numbers of ``blocks``. ``own_budget`` None: ``token_budget`` follows the knob.
    """

    index: int
    max_tokens: int
    method: SparseMethod
    own_budget: int | None
    token_budget: int
    frames: npt.NDArray[np.int64]
    blocks: LaneBlocks
    complete: bool = True
    num_placed: int = 0  # pages placed in order while complete: whole blocks
    reads: Reads = field(default_factory=Reads)
    reads_before: Reads = field(default_factory=Reads)  # without the newest step
    recalls: list[float] = field(default_factory=list)
    steps_measured: int = 0  # of those that select, when their demand was last read

    def selected_pages(self, page_size: int) -> int:
        """Full pages a sparse step selects; the partial page comes on top."""
        return self.token_budget // page_size - 1

    @property
    def num_blocks(self) -> int:
        """Per lane, on average: a whole number."""
        return self.blocks.mean
