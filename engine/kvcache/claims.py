"""What requests take of the hot tier and of the link: measured, or learned from others like them.

Pages are of all lanes of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sparsed.core import SparseMethod
from sparsed.engine.admission import Claim, Room, expected_claim, selected_pages
from sparsed.engine.hit_curve import Learned, MissCurve, measured_curve
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.pages import FreeList
from sparsed.engine.kvcache.row import Row
from sparsed.engine.kvcache.row_meter import RowMeter
from sparsed.engine.kvcache.shares import Shares
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.pace import Pace

MIN_TIMED_S: Final = 0.01  # of loads on a CPU, before their rate is believed
LEARN_EVERY: Final = 64  # observations between two lessons


class Claims:
    """Of the rows of a cache. ``observe`` between any two steps. One thread."""

    def __init__(
        self,
        rows: Mapping[int, Row],
        *,
        geometry: Geometry,
        tables: PageTables,
        shares: Shares,
        transfer: Transfer,
        frames: FreeList,
        free_rows: Sequence[int],
    ) -> None:
        self.learned = Learned()
        self._transfer = transfer
        self._frames = frames
        self._free_rows = free_rows
        self._rows = rows
        self._geometry = geometry
        self._shares = shares
        self._meter = RowMeter(tables)
        self._turn = 0
        self._is_cuda = tables.frames_RF.is_cuda

    @property
    def miss_s(self) -> float:
        """What the misses of a step take on the link, of all requests whose newest step selected; 0
        where its rate is not known."""
        rate = self._load_bytes_per_s
        selecting = (row for row in self._shares.hot_rows if row.steps_in_row)
        pages = sum(row.use.misses_per_step for row in selecting)
        return pages * self._geometry.page_bytes / rate if rate else 0.0

    def room(self, pace: Pace) -> Room:
        """What there is of everything, at that pace of steps."""
        return Room(
            hot_pages=self._hot_pages,
            free_frames=len(self._frames),
            free_rows=len(self._free_rows),
            slack_pages=pace.slack_pages(
                bytes_per_s=self._load_bytes_per_s, page_bytes=self._geometry.page_bytes
            ),
        )

    def observe(self) -> None:
        """Take what the device has counted; nothing waits for it."""
        self._meter.observe(self._rows)
        self._turn += 1
        if self._turn % LEARN_EVERY == 0:
            self._learn()

    def of_row(self, index: int) -> Claim:
        """What a request takes that has a row, spilled or not."""
        row = self._rows[index]
        mandatory = self._shares.mandatory_of(row) * self._pages_per_lane_block
        return Claim(
            mandatory_pages=mandatory,
            working_set_pages=max(mandatory, self._working_set(row)),
            frames=len(row.frames),
            curve=self.curve(row),
        )

    def of_request(
        self, num_tokens: int, *, method: SparseMethod, token_budget: int | None
    ) -> Claim:
        """What a request would take that has no row yet: as others have."""
        return expected_claim(
            num_tokens,
            method=method,
            token_budget=token_budget or self._shares.knobs.token_budget,
            geometry=self._geometry,
            lane_blocks=self._shares.lane_blocks,
            learned=self.learned,
        )

    def curve(self, row: Row) -> MissCurve:
        """The misses of a row by its slots. A row that is complete shows nothing of them."""
        total = float(len(row.frames) * self._pages_per_lane_block)
        slots = max(self._slots(row), 1.0)
        if row.method is SparseMethod.DENSE:
            return MissCurve(
                slots=slots, misses=max(total - slots, 0.0), exponent=1.0, selected=total,
                total=total, reads_all=True,
            )  # fmt: skip
        selected = min(total, selected_pages(row.token_budget, self._geometry))
        if not row.is_known or row.complete:
            return self.learned.curve(slots=slots, selected=selected, total=total)
        steps = float(row.use.num_steps + row.use.base_steps)
        return measured_curve(
            slots=slots,
            selected=selected,
            total=total,
            misses=row.use.misses_per_step * steps,
            returns=row.use.returns_per_step * steps,
            num_steps=steps,
        )

    def _working_set(self, row: Row) -> float:
        """Of a prompt in progress what it must have, which the caller adds."""
        if row.method is SparseMethod.DENSE or not row.reads.decode_steps:
            return 0.0
        if row.is_known:
            return float(row.use.window_pages + self._geometry.num_lanes)  # and the partial pages
        total = float(len(row.frames) * self._pages_per_lane_block)
        selected = min(total, selected_pages(row.token_budget, self._geometry))
        return self.learned.working_set(selected=selected, total=min(total, self._hot_pages))

    def _learn(self) -> None:
        for row in self._shares.hot_rows:
            if row.is_known and not row.complete and row.method is not SparseMethod.DENSE:
                selected = selected_pages(row.token_budget, self._geometry)
                ratio = row.use.window_pages / selected
                self.learned = self.learned.learn(ratio=ratio, curve=self.curve(row))

    def _slots(self, row: Row) -> float:
        """Slots of a row but for those of partial pages."""
        return float(row.num_blocks * self._pages_per_lane_block - self._geometry.num_lanes)

    @property
    def _load_bytes_per_s(self) -> float | None:
        """The calibrated rate of loads, else that of those so far, where all are timed; None: not
        known."""
        if (rate := self._transfer.ways.load_bytes_per_s) is not None or self._is_cuda:
            return rate
        num_bytes, seconds = self._transfer.h2d
        return num_bytes / seconds if seconds > MIN_TIMED_S else None

    @property
    def _hot_pages(self) -> int:
        """Slots of the hot tier: what lanes of equal numbers of blocks can have."""
        return self._shares.lane_blocks * self._pages_per_lane_block

    @property
    def _pages_per_lane_block(self) -> int:
        return self._geometry.num_lanes * self._geometry.pages_per_block
