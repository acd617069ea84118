"""Pages fetched ahead for nothing, against the sets of what was fetched and what was selected."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsed.kernels.resolve import Resolved, resolve_pages
from sparsed.kernels.tables import PageTables
from sparsed.kernels.wasted import count_wasted

LAYERS = 2


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def selected_rows(tables: PageTables, rows: list[int], layer: int, pages_BHK: Tensor) -> set[int]:
    """Page rows of what requests select, as ``Geometry`` has them."""
    _, num_layers, num_heads = tables.num_blocks_RLH.shape
    per_block = len(tables.page_slot_X) // (int(tables.frames_RF.max()) + 1)
    per_block //= num_layers * num_heads
    found = set()
    for b, head in itertools.product(range(len(rows)), range(num_heads)):
        for page in pages_BHK[b, head][pages_BHK[b, head] >= 0].tolist():
            if rows[b] < len(tables.frames_RF) - 1:
                frame = int(tables.frames_RF[rows[b], page // per_block])
                lane = (frame * num_layers + layer) * num_heads + head
                found.add(lane * per_block + page % per_block)
    return found


def foretold(pages_BHK: Tensor, numbers: torch.Generator) -> Tensor:
    """Some of these pages, and some that lie after them."""
    kept = torch.rand(pages_BHK.shape, generator=numbers) < 0.6
    others = torch.rand(pages_BHK.shape, generator=numbers) < 0.3
    guess_BHK = torch.where(others, pages_BHK // 2, pages_BHK)
    guess_BHK = torch.where(kept & (pages_BHK >= 0), guess_BHK, -1)
    for pages_K in guess_BHK.view(-1, guess_BHK.shape[2]):
        unique = [page for page in pages_K.unique().tolist() if page >= 0]
        pages_K.fill_(-1)
        pages_K[: len(unique)] = torch.tensor(unique, dtype=torch.int32)
    return guess_BHK.contiguous()


def resolve(
    tables: PageTables,
    pages_BHK: Tensor,
    batch: tuple[list[int], list[int]],
    *,
    layer: int,
    step: int,
    page_size: int,
    out: Resolved,
) -> None:
    rows, positions = batch
    resolve_pages(
        pages_BHK,
        rows_B=int32(*rows),
        positions_B=int32(*positions),
        layer=layer,
        tables=tables,
        step_1=int32(step),
        page_size=page_size,
        max_slots=1,
        out=out,
    )


def one_step(
    cases, tables: PageTables, step: int, batch, pages_BLHK: Tensor, page_size: int, seed: int
) -> tuple[int, int]:
    """Pages fetched ahead in all layers, and those of them that were not selected."""
    numbers = torch.Generator().manual_seed(1000 * seed + step)
    rows_LM = torch.zeros(LAYERS, pages_BLHK[:, 0].numel(), dtype=torch.int64)
    counts_L, expected = torch.zeros(LAYERS, dtype=torch.int32), 0
    for layer in range(LAYERS):
        pages_BHK = pages_BLHK[:, layer].contiguous()
        ahead, out = (cases.resolved(len(batch[0]), pages_BHK.shape[2], tables) for _ in range(2))
        ahead = ahead._replace(
            miss_dst_M=ahead.miss_dst_M[: rows_LM.shape[1]].contiguous(),
            miss_src_M=rows_LM[layer],
            num_misses_1=counts_L[layer : layer + 1],
        )
        how = {"layer": layer, "page_size": page_size}
        resolve(tables, foretold(pages_BHK, numbers), batch, step=step - 1, out=ahead, **how)
        resolve(tables, pages_BHK, batch, step=step, out=out, **how)
        fetched = rows_LM[layer, : counts_L[layer]].tolist()
        expected += len(set(fetched) - selected_rows(tables, batch[0], layer, pages_BHK))
    out_1 = torch.tensor([40])
    count_wasted(rows_LM, counts_L=counts_L, tables=tables, step_1=int32(step), out_1=out_1)
    assert out_1.tolist() == [40 + expected]
    return int(counts_L.sum()), expected


def run(cases, *, page_size, columns, num_blocks, steps, seed) -> tuple[int, int]:
    tables = cases.page_tables(
        layers=LAYERS, page_size=page_size, num_blocks=num_blocks, row_frames=8, seed=seed
    )
    fetched = wasted = 0
    for step, rows, positions, pages_BLHK in cases.decode_steps(
        tables, page_size=page_size, columns=columns, steps=steps, seed=seed
    ):
        found = one_step(cases, tables, step + 1, (rows, positions), pages_BLHK, page_size, seed)
        fetched, wasted = fetched + found[0], wasted + found[1]
    return fetched, wasted


@settings(max_examples=30)
@given(
    page_size=st.sampled_from([8, 32, 128]),
    columns=st.integers(1, 12),
    num_blocks=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    seed=st.integers(0, 9999),
)
def test_what_was_fetched_and_not_selected_is_wasted(cases, page_size, columns, num_blocks, seed):
    run(
        cases,
        page_size=page_size,
        columns=columns,
        num_blocks=[*num_blocks, 1],
        steps=15,
        seed=seed,
    )


def test_some_is_wasted_and_some_is_not(cases):
    """Also in lanes whose true selection takes the slots of what was foreseen."""
    fetched, wasted = run(cases, page_size=32, columns=7, num_blocks=[2, 3], steps=60, seed=1)
    assert fetched > wasted + 50 and wasted > 50
