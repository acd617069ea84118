"""The kernels of the bucketed LRU under Triton's interpreter; run by test_interpreter.py."""

import pytest
import torch

from sparsed.kernels import reference_resolve, resolve, seal, wasted


def clones(parts):
    return parts._make(part.clone() for part in parts)


def equal(got, expected) -> None:
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


# A small bound makes a small tile, so that the slots of a lane are several of them.
@pytest.mark.parametrize(
    ("page_size", "columns", "num_blocks", "max_slots"),
    [
        (32, 5, (2, 0, 3, 1), 12),
        (8, 40, (12, 3, 20), 1),
        (8, 33, (2, 17), 320),
        (128, 3, (2, 1, 4), 4),
        (64, 1, (1, 2), 4),
    ],
)
def test_resolve_and_seal(cases, page_size, columns, num_blocks, max_slots):
    tables = cases.page_tables(page_size=page_size, num_blocks=num_blocks, row_frames=12)
    expected_tables, total_4 = clones(tables), torch.zeros(4, dtype=torch.int64)
    for step, *batch, pages_BLHK in cases.decode_steps(
        tables, page_size=page_size, columns=columns, steps=8, seed=columns
    ):
        rows_B, positions_B = (torch.tensor(part, dtype=torch.int32) for part in batch)
        step_1 = torch.tensor([step], dtype=torch.int32)
        out = cases.resolved(len(rows_B), columns, tables)
        expected = clones(out)
        for layer in range(2):  # two layers share one list of misses
            lane_pages_BHK = pages_BLHK[:, layer].contiguous()
            before = (lane_pages_BHK, rows_B, positions_B, layer)
            after = (step_1, page_size, max_slots)
            resolve._launch(*before, tables, *after, out)
            reference_resolve.resolve_pages(*before, expected_tables, *after, expected)
            equal(out, expected)
            equal(tables, expected_tables)
        total_4 += out.counters_4
        out = cases.sealed(len(rows_B), tables)
        expected = clones(out)
        rest = (positions_B, tables, step_1, page_size, out)
        seal._launch(rows_B, *rest)
        reference_resolve.seal_pages(
            rows_B, positions_B, expected_tables, step_1, page_size, expected
        )
        for name in ("src_M", "dst_M"):  # whose order is free
            pairs, expected_pairs = (getattr(part, name).sort().values for part in (out, expected))
            assert torch.equal(pairs, expected_pairs)
        assert torch.equal(out.num_seals_1, expected.num_seals_1)
        equal(tables, expected_tables)
    assert (total_4[:3] > 0).all()


@pytest.mark.parametrize("room", [1, 600, 5000])
def test_count_wasted(cases, room):
    """Lists empty, short and full; some pages without a slot, some used in another step."""
    tables = cases.page_tables(page_size=8, num_blocks=(9,), row_frames=40)
    numbers = torch.Generator().manual_seed(room)
    held = torch.randperm(len(tables.page_slot_X), generator=numbers)[: len(tables.slot_step_N)]
    tables.page_slot_X[held] = torch.arange(len(held), dtype=torch.int32)
    tables.slot_step_N.random_(6, 9, generator=numbers)
    rows_LM = torch.randint(0, len(tables.page_slot_X), (3, room), generator=numbers)
    rows_LM[:, ::2] = held[torch.randint(0, len(held), rows_LM[:, ::2].shape, generator=numbers)]
    counts_L = torch.tensor([0, room // 3, room], dtype=torch.int32)
    step_1, out_1 = torch.tensor([7], dtype=torch.int32), torch.tensor([100])
    expected_1 = out_1.clone()
    wasted._launch(rows_LM, counts_L, tables, step_1, out_1)
    reference_resolve.count_wasted(rows_LM, counts_L, tables, step_1, expected_1)
    assert torch.equal(out_1, expected_1)
    assert room == 1 or 100 < out_1 < 100 + counts_L.sum()
