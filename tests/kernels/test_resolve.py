"""The bucketed LRU of the CPU path, against dictionaries and lists, and against other policies."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsed.kernels.resident import BLOCK_TOKENS
from sparsed.kernels.resolve import resolve_pages
from sparsed.kernels.seal import seal_pages
from sparsed.kernels.tables import FREE_STEP, LOCKED_STEP, PageTables

PAGE_SIZE = 128  # where nothing else is asked for: a block is a page


class Given(NamedTuple):
    """What a lane is to have in a step."""

    slots: list[int]
    num_hits: int
    tail_slot: int
    misses: list[tuple[int, int]]  # slot, page
    counts: tuple[int, int, int, int]
    window: int
    num_returns: int


class Lane:
    """A dictionary of pages, and the last steps of slots, in slot order."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.slot_of: dict[int, int] = {}
        self.last = dict.fromkeys(slots, FREE_STEP)

    def step(self, pages: Sequence[int], tail: int, now: int) -> Given:
        hits = [page for page in pages if page in self.slot_of]
        missed = [page for page in pages if page not in self.slot_of]
        wanting = [tail] * (tail not in self.slot_of) + missed
        num_returns = sum(self.last[self.slot_of[page]] < now - 1 for page in hits)
        self.last |= {self.slot_of[page]: now for page in hits}
        if tail in self.slot_of:
            self.last[self.slot_of[tail]] = LOCKED_STEP
        victims = self.victims(len(wanting), now)
        evicted = [page for page, slot in self.slot_of.items() if slot in victims]
        assert not {*evicted} & {tail, *pages}
        for page in evicted:
            del self.slot_of[page]
        served = list(zip(wanting, victims, strict=False))
        for page, slot in served:
            self.slot_of[page] = slot
            self.last[slot] = LOCKED_STEP if page == tail else now
        misses = [(slot, page) for page, slot in served if page != tail]
        return Given(
            slots=[self.slot_of[page] for page in hits] + [slot for slot, _ in misses],
            num_hits=len(hits),
            tail_slot=self.slot_of.get(tail, -1),
            misses=misses,
            counts=(len(pages), len(missed), len(evicted), len(wanting) - len(served)),
            window=sum(max(now - 12, -1) < last <= now for last in self.last.values()),
            num_returns=num_returns,
        )

    def victims(self, most: int, now: int) -> list[int]:
        """Free slots, then by age; those of the last class that is needed come last."""
        classes = [
            (0 if last == FREE_STEP else 64 - min(63, now - last), place, slot)
            for place, (slot, last) in enumerate(self.last.items())
            if last < now
        ]
        chosen = sorted(classes)[:most]
        cut = chosen[-1][0] if chosen else 0
        return [slot for _, _, slot in sorted(chosen, key=lambda one: (one[0] == cut, one[1]))]


class Lanes:
    """All lanes of the tables, and what of them the tables must say."""

    def __init__(self, tables: PageTables, page_size: int) -> None:
        self.tables, self.pages_per_block = tables, BLOCK_TOKENS // page_size
        self.of = {
            (row, layer, head): Lane(
                [
                    block * self.pages_per_block + i
                    for block in blocks[: tables.num_blocks_RLH[row, layer, head]]
                    for i in range(self.pages_per_block)
                ]
            )
            for row, layers in enumerate(tables.lane_blocks_RLHN.tolist()[:-1])
            for layer, heads in enumerate(layers)
            for head, blocks in enumerate(heads)
        }

    def page_row(self, row: int, layer: int, head: int, page: int) -> int:
        """As ``Geometry`` has it."""
        _, num_layers, num_heads = self.tables.num_blocks_RLH.shape
        frame = int(self.tables.frames_RF[row, page // self.pages_per_block])
        lane = (frame * num_layers + layer) * num_heads + head
        return lane * self.pages_per_block + page % self.pages_per_block

    def check(self) -> None:
        slot_of, page_in, last = {}, {}, {}
        for place, lane in self.of.items():
            slot_of |= {self.page_row(*place, page): slot for page, slot in lane.slot_of.items()}
            page_in |= {slot: page for page, slot in lane.slot_of.items()}
            last |= lane.last
        assert len(page_in) == len(slot_of)
        assert nonzero(self.tables.page_slot_X, but=-1) == slot_of
        assert nonzero(self.tables.slot_page_N, but=-1) == page_in
        in_use = {slot: step for slot, step in last.items() if step != FREE_STEP}
        assert nonzero(self.tables.slot_step_N, but=FREE_STEP) == in_use
        assert in_use.keys() == page_in.keys()


def nonzero(table: Tensor, *, but: int) -> dict[int, int]:
    return {place: value for place, value in enumerate(table.tolist()) if value != but}


def check_layer(cases, lanes: Lanes, step: int, rows: list[int], positions: list[int],
                layer: int, pages_BHK: Tensor, page_size: int) -> Tensor:  # fmt: skip
    out = cases.resolved(len(rows), pages_BHK.shape[2], lanes.tables)
    resolve_pages(
        pages_BHK,
        rows_B=torch.tensor(rows, dtype=torch.int32),
        positions_B=torch.tensor(positions, dtype=torch.int32),
        layer=layer,
        tables=lanes.tables,
        step_1=torch.tensor([step], dtype=torch.int32),
        page_size=page_size,
        max_slots=1,
        out=out,
    )
    misses, counts = [], np.zeros(4, dtype=int)
    for b, row in enumerate(rows):
        for head, chosen in enumerate(pages_BHK[b].tolist()):
            want = Given([], 0, -1, [], (0, 0, 0, 0), 0, 0)
            place = (row, layer, head)
            if place in lanes.of:
                pages = [page for page in chosen if page >= 0]
                want = lanes.of[place].step(pages, positions[b] // page_size, step)
                assert out.window_RLH[place] == want.window
                assert out.demand_RLH2[place].tolist() == [want.counts[1], want.num_returns]
            slots = want.slots + [-1] * (len(chosen) - len(want.slots))
            assert out.slots_BHK[b, head].tolist() == slots
            assert out.num_hits_BH[b, head] == want.num_hits
            assert out.tail_slots_BH[b, head] == want.tail_slot
            misses += [(slot, lanes.page_row(*place, page)) for slot, page in want.misses]
            counts += want.counts
    assert out.num_misses_1.tolist() == [len(misses)]
    listed = (out.miss_dst_M[: len(misses)].tolist(), out.miss_src_M[: len(misses)].tolist())
    assert list(zip(*listed, strict=True)) == misses
    assert (out.miss_dst_M[len(misses) :] == -77).all()
    assert out.counters_4.tolist() == counts.tolist()
    assert out.demand_RLH2[..., 0].sum() == counts[1]
    lanes.check()
    return out.counters_4


def check_seal(cases, lanes: Lanes, step: int, rows: list[int], positions: list[int],
               page_size: int) -> int:  # fmt: skip
    out = cases.sealed(len(rows), lanes.tables)
    seal_pages(
        torch.tensor(rows, dtype=torch.int32),
        positions_B=torch.tensor(positions, dtype=torch.int32),
        tables=lanes.tables,
        step_1=torch.tensor([step], dtype=torch.int32),
        page_size=page_size,
        out=out,
    )
    pairs = set()
    for place, lane in lanes.of.items():
        position = dict(zip(rows, positions, strict=True)).get(place[0], 0)
        page = position // page_size
        if position % page_size == page_size - 1 and page in lane.slot_of:
            lane.last[lane.slot_of[page]] = step
            pairs.add((lane.slot_of[page], lanes.page_row(*place, page)))
    assert out.num_seals_1.tolist() == [len(pairs)]
    assert set(zip(out.src_M.tolist(), out.dst_M.tolist(), strict=True)) - {(-77, -77)} == pairs
    lanes.check()
    return len(pairs)


@settings(max_examples=40)
@given(
    page_size=st.sampled_from([8, 16, 32, 64, 128]),
    columns=st.integers(1, 12),
    num_blocks=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    seed=st.integers(0, 9999),
)
def test_any_decode_follows_the_dictionaries(cases, page_size, columns, num_blocks, heads, seed):
    tables = cases.page_tables(
        heads=heads, page_size=page_size, num_blocks=[*num_blocks, 1], row_frames=8, seed=seed
    )
    lanes = Lanes(tables, page_size)
    decode = cases.decode_steps(tables, page_size=page_size, columns=columns, steps=30, seed=seed)
    for step, rows, positions, pages_BLHK in decode:
        for layer in range(2):
            pages_BHK = pages_BLHK[:, layer].contiguous()
            check_layer(cases, lanes, step, rows, positions, layer, pages_BHK, page_size)
        check_seal(cases, lanes, step, rows, positions, page_size)


def test_a_decode_meets_every_case(cases):
    """Hits, misses, evictions, lanes too small and full pages: what the others rely on."""
    tables = cases.page_tables(page_size=32, num_blocks=[1, 2, 3, 0], row_frames=8, seed=1)
    lanes, counts, num_sealed = Lanes(tables, 32), torch.zeros(4, dtype=torch.int64), 0
    for step, rows, positions, pages_BLHK in cases.decode_steps(
        tables, page_size=32, columns=7, steps=60, seed=1
    ):
        pages_BHK = pages_BLHK[:, 0].contiguous()
        counts += check_layer(cases, lanes, step, rows, positions, 0, pages_BHK, 32)
        num_sealed += check_seal(cases, lanes, step, rows, positions, 32)
    selected, missed, evicted, overflow = counts.tolist()
    assert selected > missed > evicted > 50 and overflow > 50 and num_sealed > 5


def synthetic_selections(*, steps: int, lanes: int, pages: int, columns: int) -> np.ndarray:
    """(steps, lanes, columns): some pages are liked for good, others for a while, some by chance."""
    numbers = np.random.default_rng(0)
    liked, mood = numbers.normal(size=(lanes, pages)), np.zeros((lanes, pages))
    selections = []
    for _ in range(steps):
        mood = 0.9 * mood + 0.44 * numbers.normal(size=mood.shape)
        score = liked + mood + 0.3 * numbers.normal(size=mood.shape)
        selections.append(np.sort(np.argsort(-score, axis=1)[:, :columns], axis=1))
    return np.stack(selections)


def bucketed_hits(cases, selections_SLK: np.ndarray, capacity: int) -> float:
    num_steps, num_lanes, columns = selections_SLK.shape
    num_pages = int(selections_SLK.max()) + 1
    tables = cases.page_tables(
        rows=1,
        layers=1,
        heads=num_lanes,
        page_size=PAGE_SIZE,
        row_frames=num_pages + 1,
        num_blocks=[capacity + 1],  # one of them holds the partial page
    )
    out = cases.resolved(1, columns, tables)
    for step, pages_LK in enumerate(torch.from_numpy(selections_SLK).int()):
        out.num_misses_1.zero_()
        resolve_pages(
            pages_LK[None].contiguous(),
            rows_B=torch.zeros(1, dtype=torch.int32),
            positions_B=torch.tensor([num_pages * PAGE_SIZE], dtype=torch.int32),
            layer=0,
            tables=tables,
            step_1=torch.tensor([step], dtype=torch.int32),
            page_size=PAGE_SIZE,
            max_slots=capacity + 1,
            out=out,
        )
    selected, missed, _, overflow = out.counters_4.tolist()
    assert selected == num_steps * num_lanes * columns and overflow == 0
    return 1 - missed / selected


def hits_of(selections_SLK: np.ndarray, capacity: int, *, knows_future: bool) -> float:
    """Of exact LRU, or of Belady's rule: what is used again latest goes; one access a time."""
    num_hits = 0
    for lane_SK in selections_SLK.transpose(1, 0, 2).tolist():
        uses: dict[int, list[int]] = {}
        for step, pages in enumerate(lane_SK):
            for page in pages:
                uses.setdefault(page, []).insert(0, step)
        held: dict[int, int] = {}  # page: number of its last access
        for number, pages in enumerate(lane_SK):
            num_hits += len(held.keys() & set(pages))
            missed = [page for page in pages if page not in held]
            for i, page in enumerate(pages):
                uses[page].pop()
                if page in held:
                    held[page] = number * len(pages) + i
            for page in missed:
                if len(held) >= capacity:
                    idle = held.keys() - set(pages)
                    if knows_future:
                        gone = max(idle, key=lambda one: uses[one][-1] if uses[one] else 1 << 30)
                    else:
                        gone = min(idle, key=held.__getitem__)
                    del held[gone]
                held[page] = number * len(pages) + pages.index(page)
    return num_hits / selections_SLK.size


@pytest.mark.slow
@pytest.mark.parametrize("times", [1.5, 2, 4])
def test_hits_are_those_of_exact_lru(cases, times):
    selections_SLK = synthetic_selections(steps=80, lanes=4, pages=400, columns=31)
    capacity = int(31 * times)
    bucketed = bucketed_hits(cases, selections_SLK, capacity)
    exact, best = (hits_of(selections_SLK, capacity, knows_future=known) for known in (False, True))
    print(f"{times}x: bucketed {bucketed:.4f}, exact {exact:.4f}, Belady {best:.4f}")
    assert abs(bucketed - exact) < 0.005 and bucketed < best < 1
