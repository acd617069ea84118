"""How many blocks each request must have, may have and can use; nothing moves here.

All counts are blocks per lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sparsed.core import Knobs, SparseMethod
from sparsed.engine.admission import mandatory_blocks
from sparsed.engine.budgets import Share, by_gain
from sparsed.engine.hit_curve import MissCurve
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.row import Row
from sparsed.kernels.resolve import MAX_SLOTS

Rule = Callable[[Sequence[Share], int], list[int]]


class Shares:
    """Of ``rows``, by ``knobs`` and the arena's ``num_blocks`` of all lanes. ``rule`` divides the
    arena among requests where ``hbm_budget`` is auto. Spilled rows have no share."""

    def __init__(
        self,
        rows: Mapping[int, Row],
        *,
        geometry: Geometry,
        num_blocks: int,
        knobs: Knobs,
        rule: Rule = by_gain,
    ) -> None:
        self.knobs = knobs
        self.rule = rule
        self._rows = rows
        self._geometry = geometry
        self.lane_blocks = num_blocks // geometry.num_lanes  # what one request alone may have

    @property
    def hot_rows(self) -> list[Row]:
        """Rows that hold blocks, in order of admission."""
        return [row for row in self._rows.values() if not row.is_spilled]

    def mandatory_of(self, row: Row) -> int:
        """As ``mandatory``; what a request was admitted with still holds if it reads all by now."""
        return self.mandatory(row.max_tokens, method=row.admitted_as, token_budget=row.token_budget)

    def mandatory(self, num_tokens: int, *, method: SparseMethod, token_budget: int) -> int:
        """Blocks a request cannot go without: its selection and the partial page, or everything
        where attention is dense; all there are if it asks for more."""
        return mandatory_blocks(
            num_tokens, method=method, token_budget=token_budget, lane_blocks=self.lane_blocks
        )

    def quota(self, row: Row) -> int:
        """Blocks ``row`` may hold: what nobody takes from it, and unless the knob says how many,
        what is free above the watermark."""
        rights = self.rights(row)
        if self.knobs.hbm_budget is not None:
            return rights
        free = self.lane_blocks - sum(one.num_blocks for one in self.hot_rows)
        return max(rights, min(row.num_blocks + max(0, free - self.watermark), self.most(row)))

    def rights(self, row: Row) -> int:
        """Blocks that ``row`` keeps or gets though others want them: the knob, else what it was
        given, else an even share. Those above are not pinned: good until somebody takes them."""
        budget = self.knobs.hbm_budget
        rights = num_frames(budget) if budget is not None else row.share or self._even()
        return max(min(rights, self.most(row)), self.mandatory_of(row))

    def _even(self) -> int:
        return self.lane_blocks // max(1, len(self.hot_rows))

    def whole(self, row: Row) -> int:
        """Blocks that hold every page ``row`` has so far, or as many of them as a lane can use."""
        return max(1, min(num_frames(row.num_tokens), self.most(row)))

    @property
    def watermark(self) -> int:
        """Blocks that stay free while requests are kept whole."""
        return math.ceil(self.knobs.residency_watermark * self.lane_blocks)

    def spare(self) -> int:
        """Blocks that would be free if every request were there whole, spilled ones as well."""
        wanted = (max(self.whole(row), self.mandatory_of(row)) for row in self._rows.values())
        return self.lane_blocks - sum(wanted)

    def most(self, row: Row) -> int:
        """Blocks that a lane of ``row`` can use: all of the request, or where it selects as many
        slots as ``resolve_pages`` looks through."""
        if row.method is SparseMethod.DENSE:
            return len(row.frames)
        return min(len(row.frames), MAX_SLOTS // self._geometry.pages_per_block)

    def floor(self, row: Row, *, num_rows: int) -> int:
        """What ``row`` keeps when others need room: an even share of so many, or its need."""
        return max(self.lane_blocks // num_rows, self.mandatory_of(row))

    def reclaimable(self) -> int:
        """Blocks above the shares that hold once another request is there."""
        rows = self.hot_rows
        above = (row.num_blocks - self.floor(row, num_rows=len(rows) + 1) for row in rows)
        return sum(max(0, blocks) for blocks in above)

    def divide(self, curve_of: Callable[[Row], MissCurve]) -> None:
        """Give every row its share of the arena, where the knob leaves that to the rule."""
        rows = self.hot_rows
        if self.knobs.hbm_budget is not None or not rows:
            return
        shares = [self._share(row, curve_of(row)) for row in rows]
        if sum(share.least for share in shares) > self.lane_blocks:
            return  # pressure: somebody is about to be spilled
        for row, blocks in zip(rows, self.rule(shares, self.lane_blocks), strict=True):
            row.share = blocks

    def forget(self) -> None:
        """Requests have come or gone: an even share each until the next division."""
        for row in self._rows.values():
            row.share = None

    def _share(self, row: Row, curve: MissCurve) -> Share:
        geometry, least = self._geometry, self.mandatory_of(row)
        return Share(
            least=least,
            most=max(least, self.whole(row)),
            curve=curve,
            slots_per_block=geometry.num_lanes * geometry.pages_per_block,
        )
