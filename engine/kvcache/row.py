"""One request's place in both tiers, and what its steps have read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sparsed.core import SparseMethod
from sparsed.engine.kvcache.lane_blocks import LaneBlocks

KNOWN_STEPS: Final = 16  # in a row that select: at least the 12 of a window
STALE_STEPS: Final = 64  # after which a window says nothing of what would be selected now


class Reads(NamedTuple):
    """What the decode steps of a request have attended to; see ``SparseDetails``.
    ``replayed_steps``: sparse ones that a recording selected for."""

    decode_steps: int = 0
    sparse_steps: int = 0
    replayed_steps: int = 0
    tokens_read: int = 0
    tokens_dense: int = 0


class Use(NamedTuple):
    """Pages of all lanes of a row, filled by ``RowMeter``: used in the newest 12 steps, missed in a
    step, and hit in one though the step before had not used them. The rates are of ``num_steps``
    steps that select and, for what was known before these, of ``base_steps`` more at the ``base``
    rates. ``window_at``: decode steps of the row when its window was last a full one."""

    window_pages: int = 0
    window_at: int | None = None
    num_steps: int = 0
    misses_per_step: float = 0.0
    returns_per_step: float = 0.0
    base_misses: float = 0.0
    base_returns: float = 0.0
    base_steps: int = 0


class Ranking(NamedTuple):
    """The newest one of a row: for the token at ``position``, of so many pages."""

    position: int
    num_pages: int


@dataclass(slots=True)
class Row:
    """One request's place in both tiers. Filled by KVCache; attention reads it and counts in it.

    ``complete`` means that page i sits in slot i of every lane, for all pages of every block that
    the request has reached; once a page has no slot it is false, until the row is brought back
    whole. Lanes of a complete row own equal numbers of ``blocks``. ``own_budget`` None:
    ``token_budget`` follows the knob. ``admitted_as`` is the method it was admitted with; the
    quality breaker may have made it dense since. ``is_spilled``: it owns frames and no blocks, and
    takes part in no step. ``share``: blocks per lane it was given, None: an even share.
    ``num_lost``: blocks of its oldest pages that it gave up when it was whole last; those it kept
    came after them. ``steps_in_row``: newest steps that all selected; what others attend to is in no window, so the
    tables forget the row's where they begin. ``ranking``: whose pages are kept.
    """

    index: int
    max_tokens: int
    method: SparseMethod
    admitted_as: SparseMethod
    own_budget: int | None
    token_budget: int
    frames: npt.NDArray[np.int64]
    blocks: LaneBlocks
    complete: bool = True
    is_spilled: bool = False
    share: int | None = None
    num_tokens: int = 0  # that it has, those of the step to come included
    num_placed: int = 0  # pages in order from the first, of whole blocks: all if complete
    num_lost: int = 0
    reads: Reads = field(default_factory=Reads)
    reads_before: Reads = field(default_factory=Reads)  # without the newest step
    recalls: list[float] = field(default_factory=list)
    use: Use = field(default_factory=Use)
    steps_measured: int = 0  # of those that select, when their demand was last read
    steps_in_row: int = 0
    ranking: Ranking | None = None

    def selected_pages(self, page_size: int) -> int:
        """Full pages a sparse step selects; the partial page comes on top."""
        return self.token_budget // page_size - 1

    @property
    def has_window(self) -> bool:
        """Whether the newest steps have filled a window."""
        return self.steps_in_row >= KNOWN_STEPS

    @property
    def is_known(self) -> bool:
        """Whether ``use`` tells what the row uses and misses where it selects: there were steps
        enough, and not too long ago."""
        window_at = self.use.window_at
        return window_at is not None and self.reads.decode_steps - window_at <= STALE_STEPS

    @property
    def num_blocks(self) -> int:
        """Per lane, on average: a whole number."""
        return self.blocks.mean
