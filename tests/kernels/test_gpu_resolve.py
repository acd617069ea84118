"""The bucketed LRU on a real device, against its twin; speeds are printed (run with -s)."""

import os

import pytest
import torch
from torch import Tensor

from sparsed.kernels.copy import copy_pages
from sparsed.kernels.resolve import resolve_pages
from sparsed.kernels.seal import seal_pages
from sparsed.kernels.wasted import count_wasted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def seed() -> int:
    """Another one every run; pytest shows it where a test fails."""
    seed = int.from_bytes(os.urandom(2), "little")
    print(f"seed {seed}")
    return seed


def moved(parts, device: str):
    return parts._make(part.to(device) for part in parts)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(got, expected, *, listed: tuple[str, ...] = ()) -> None:
    """Equal, but for the order of the pairs of a list."""
    got = moved(got, "cpu")
    for name in set(got._fields) - set(listed):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    pairs, expected_pairs = (
        sorted(zip(*(getattr(part, name).tolist() for name in listed), strict=True))
        for part in (got, expected)
    )
    assert pairs == expected_pairs


@pytest.mark.parametrize(
    ("page_size", "columns", "num_blocks", "max_slots"),
    [
        (32, 5, (2, 0, 3, 1), 12),
        (32, 63, (16, 30), 120),
        (8, 255, (20, 40), 640),
        (8, 1024, (70, 160, 300), 4800),
        (8, 40, (12, 30), 1),
        (128, 3, (2, 1, 4), 4),
    ],
)
def test_decode(cases, page_size, columns, num_blocks, max_slots, seed):
    tables = cases.page_tables(
        heads=3, page_size=page_size, num_blocks=num_blocks, row_frames=150, seed=seed
    )
    on_gpu = moved(tables, "cuda")
    for step, rows, positions, pages_BLHK in cases.decode_steps(
        tables, page_size=page_size, columns=columns, steps=25, seed=seed
    ):
        out, sealed = cases.resolved(len(rows), columns, tables), cases.sealed(len(rows), tables)
        gpu_out, gpu_sealed = moved(out, "cuda"), moved(sealed, "cuda")
        for device, own_tables, own_out, own_sealed in (
            ("cpu", tables, out, sealed),
            ("cuda", on_gpu, gpu_out, gpu_sealed),
        ):
            rows_B, positions_B, step_1 = (
                int32(values).to(device) for values in (rows, positions, [step])
            )
            own = {"tables": own_tables, "step_1": step_1, "page_size": page_size}
            for layer in range(2):
                resolve_pages(
                    pages_BLHK[:, layer].contiguous().to(device),
                    rows_B=rows_B,
                    positions_B=positions_B,
                    layer=layer,
                    max_slots=max_slots,
                    out=own_out,
                    **own,
                )
            seal_pages(rows_B, positions_B=positions_B, out=own_sealed, **own)
        check(gpu_out, out, listed=("miss_dst_M", "miss_src_M"))
        check(gpu_sealed, sealed, listed=("src_M", "dst_M"))
        check(on_gpu, tables)


@pytest.mark.parametrize("room", [1, 600, 50_000])
def test_count_wasted(cases, room, seed):
    """Lists empty, short and full; some pages without a slot, some used in another step."""
    tables = cases.page_tables(page_size=8, num_blocks=(9,), row_frames=40, seed=seed)
    numbers = torch.Generator().manual_seed(seed)
    held = torch.randperm(len(tables.page_slot_X), generator=numbers)[: len(tables.slot_step_N)]
    tables.page_slot_X[held] = torch.arange(len(held), dtype=torch.int32)
    tables.slot_step_N.random_(6, 9, generator=numbers)
    rows_LM = torch.randint(0, len(tables.page_slot_X), (3, room), generator=numbers)
    found = []
    for device in ("cpu", "cuda"):
        out_1 = torch.tensor([100], device=device)
        count_wasted(
            rows_LM.to(device),
            counts_L=int32([0, room // 3, room]).to(device),
            tables=moved(tables, device),
            step_1=int32([7]).to(device),
            out_1=out_1,
        )
        found.append(out_1.item())
    assert found[0] == found[1] and (room == 1 or found[0] > 100)


def test_a_captured_step_goes_on(cases, seed):
    """Pages come from below, are read in their slots, and the full one goes back: one graph."""
    page_size, columns, steps = 8, 12, 40
    tables = cases.page_tables(
        rows=1, layers=1, page_size=page_size, num_blocks=[2, 1], row_frames=4, seed=seed
    )
    on_gpu = moved(tables, "cuda")
    out, sealed = (
        moved(part, "cuda")
        for part in (cases.resolved(1, columns, tables), cases.sealed(1, tables))
    )
    pages_BHK = torch.full((1, 2, columns), -1, dtype=torch.int32, device="cuda")
    rows_B, positions_B, step_1 = (int32([value]).cuda() for value in (0, 200, -1))
    saved = torch.randn(len(tables.page_slot_X), 8, device="cuda")
    arena = torch.full((len(tables.slot_page_N), 8), float("nan"), device="cuda")
    shared = {"tables": on_gpu, "step_1": step_1, "page_size": page_size}

    def step() -> None:
        step_1.add_(1)
        positions_B.add_(1)
        out.num_misses_1.zero_()
        sealed.num_seals_1.zero_()
        resolve_pages(
            pages_BHK, rows_B=rows_B, positions_B=positions_B, layer=0, max_slots=32, out=out,
            **shared,
        )  # fmt: skip
        rows = {"dst_rows_M": out.miss_dst_M, "src_rows_M": out.miss_src_M}
        copy_pages(arena, saved, count=out.num_misses_1, **rows)
        seal_pages(rows_B, positions_B=positions_B, out=sealed, **shared)
        rows = {"dst_rows_M": sealed.dst_M, "src_rows_M": sealed.src_M}
        copy_pages(saved, arena, count=sealed.num_seals_1, **rows)

    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiled before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    for now in range(1, steps):
        full = (200 + now + 1) // page_size
        for head in range(2):
            pages_BHK[0, head] = torch.randperm(full)[:columns].sort().values.int()
        graph.replay()
        assert step_1.item() == now
        frame_1 = tables.frames_RF[0].long()
        for head in range(2):
            slots = out.slots_BHK[0, head].cpu()
            assert (slots >= 0).all()
            for slot in slots.tolist():
                page = int(on_gpu.slot_page_N[slot])
                row = int((frame_1[page // 16] * 2 + head) * 16 + page % 16)
                assert torch.equal(arena[slot], saved[row])
            if (201 + now) % page_size < page_size - 1:  # what is sealed is written no more
                arena[int(out.tail_slots_BH[0, head])] = float(now)
    assert out.counters_4.tolist()[3] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requests", "heads", "columns", "slots"),
    [(24, 8, 255, 1024), (24, 8, 63, 256), (4, 8, 255, 1024), (24, 8, 1020, 4096)],
)
def test_resolve_speed(cases, requests, heads, columns, slots):
    """Of a captured step, which finds one page in twenty absent, and of one that finds them all."""
    torch.use_deterministic_algorithms(False)  # poisoning memory takes time
    page_size, pages, lanes = 8, 4096, requests * heads
    tables = cases.page_tables(
        rows=requests, layers=1, heads=heads, page_size=page_size,
        num_blocks=[slots // 16], row_frames=pages // 16 + 1,
    )  # fmt: skip
    on_gpu, out = moved(tables, "cuda"), moved(cases.resolved(requests, columns, tables), "cuda")
    rows_B = torch.arange(requests, dtype=torch.int32, device="cuda")
    positions_B, step_1 = torch.full_like(rows_B, pages * page_size), int32([0]).cuda()
    pages_BHK = torch.empty(requests, heads, columns, dtype=torch.int32, device="cuda")

    def step() -> None:
        step_1.add_(1)
        out.num_misses_1.zero_()
        resolve_pages(
            pages_BHK, rows_B=rows_B, positions_B=positions_B, layer=0, tables=on_gpu,
            step_1=step_1, page_size=page_size, max_slots=slots, out=out,
        )  # fmt: skip

    def select(first: int) -> None:
        """Pages from ``first`` on, so that those of another are new."""
        pages_BHK.copy_(torch.arange(columns, dtype=torch.int32, device="cuda") + first)

    select(0)
    step()
    graph, clearing = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with torch.cuda.graph(clearing):
        step_1.add_(1)
        out.num_misses_1.zero_()
    times_us: dict[int, list[float]] = {0: [], columns // 20: []}
    first = 0
    for new, found_us in times_us.items():
        for _ in range(20):
            first = (first + new) % (pages - columns)
            select(first)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            torch.cuda._sleep(2_000_000)  # the launches are queued by then
            events[0].record()
            graph.replay()
            events[1].record()
            clearing.replay()
            events[2].record()
            torch.cuda.synchronize()
            whole, rest = (events[i].elapsed_time(events[i + 1]) * 1e3 for i in range(2))
            found_us.append(whole - rest)
    assert out.counters_4.tolist()[1] > lanes * columns and out.counters_4.tolist()[3] == 0
    hit_us, miss_us = (sorted(found_us)[10] for found_us in times_us.values())
    print(f"resolve {lanes} lanes, {columns} in {slots}: {hit_us:.1f} and {miss_us:.1f} us")
    assert miss_us < 1000
