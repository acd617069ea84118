"""Scoring in two passes, and summaries in 8 bits, against scores of every page."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from sparsed.engine.sparse.coarse import (
    Level,
    score_coarse_to_fine,
    select_pages,
    super_summaries,
)
from sparsed.engine.sparse.int8 import to_int8
from sparsed.kernels.score import score_pages

HEADS, DIM, FRAME_PAGES = 2, 6, 4
few = settings(max_examples=40)


class Scene(NamedTuple):
    """Requests of so many full pages; ``flat`` are the scores of all of them."""

    query_BHE: Tensor
    fine: Level
    coarse: Level
    num_full_B: Tensor
    flat_BHP: Tensor

    def candidates(self, num_supers: int):
        return score_coarse_to_fine(
            self.query_BHE,
            fine=self.fine,
            coarse=self.coarse,
            num_full_B=self.num_full_B,
            num_supers=num_supers,
        )


def random_bounds(*shape: int, generator: torch.Generator) -> Tensor:
    """Summaries (*shape, 2 * DIM), upper not below lower."""
    corners = torch.randn(2, *shape, DIM, generator=generator)
    return torch.cat((corners.amax(0), corners.amin(0)), dim=-1)


def random_query(*shape: int, generator: torch.Generator) -> Tensor:
    q = torch.randn(*shape, DIM, generator=generator)
    return torch.cat((q.clamp(min=0), q.clamp(max=0)), dim=-1)


def make_scene(
    num_full: list[int], *, frames_per_super: int, int8: bool = False, seed: int = 0
) -> Scene:
    """Frames lie in no order; what is not complete holds NaN, or steps of any number."""
    generator = torch.Generator().manual_seed(seed)
    per_super = frames_per_super * FRAME_PAGES
    num_supers = max(-(-full // per_super) for full in num_full)
    lanes = (len(num_full), HEADS)
    num_full_B = torch.tensor(num_full)
    pages_BHPE = random_bounds(*lanes, num_supers * per_super, generator=generator)
    supers_BHCE = super_summaries(pages_BHPE.flatten(0, 1), pages_per_super=per_super)
    supers_BHCE = supers_BHCE.view(*lanes, num_supers, -1)
    absent_BP = torch.arange(num_supers * per_super) >= num_full_B[:, None]
    pages_BHPE[absent_BP[:, None].expand(-1, HEADS, -1)] = math.nan
    open_BC = torch.arange(num_supers) >= ((num_full_B - 1) // per_super)[:, None]
    supers_BHCE[open_BC[:, None].expand(-1, HEADS, -1)] = math.nan
    levels = [
        scattered(summaries, int8=int8, generator=generator)
        for summaries in (pages_BHPE.unflatten(2, (-1, FRAME_PAGES)), supers_BHCE.unsqueeze(3))
    ]
    empty_BF = absent_BP.view(len(num_full), -1, FRAME_PAGES).all(-1)
    levels[0].rows.masked_fill_(empty_BF[:, None], -1)
    query_BHE = random_query(*lanes, generator=generator)
    flat_BHP = levels[0].score(query_BHE, rows=levels[0].rows)
    return Scene(query_BHE, *levels, num_full_B, flat_BHP)


def scattered(summaries_BHFXE: Tensor, *, int8: bool, generator: torch.Generator) -> Level:
    lanes = summaries_BHFXE.shape[:3]
    rows = torch.randperm(math.prod(lanes) + 3, generator=generator)[:-3].view(lanes)
    store_RXE = torch.full((rows.numel() + 3, *summaries_BHFXE.shape[3:]), math.nan)
    store_RXE[rows] = summaries_BHFXE
    if not int8:
        return Level(store_RXE, rows)
    missing_RX = store_RXE.isnan().any(-1)
    steps_RXE, scales_RX = to_int8(store_RXE.nan_to_num(9.0))
    return Level(steps_RXE, rows, scales_RX.masked_fill(missing_RX, math.nan))


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    return make_scene(
        draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)),
        frames_per_super=draw(st.integers(1, 3)),
        int8=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


@few
@given(scene=scenes(), count=st.integers(2, 9))
def test_all_super_pages_select_what_all_pages_do(scene: Scene, count: int) -> None:
    found = scene.candidates(scene.coarse.rows.shape[2])
    in_order_BHP = found.scores_BHP.gather(2, found.pages_BHP.argsort(-1))
    assert torch.equal(found.pages_BHP.sort(-1).values[0, 0], torch.arange(in_order_BHP.shape[2]))
    assert_close(in_order_BHP, scene.flat_BHP, equal_nan=True)
    for b, num_full in enumerate(scene.num_full_B.tolist()):
        best = min(count, num_full)
        flat_HK, chosen_HK = (
            select_pages(
                scores[b : b + 1], num_full_B=scene.num_full_B[b : b + 1], count=best, pages_BHP=ids
            )[0]
            for scores, ids in (
                (scene.flat_BHP, None),
                (found.scores_BHP, found.pages_BHP[b : b + 1]),
            )
        )
        if best > 1:
            assert torch.equal(chosen_HK.sort(-1).values, flat_HK.sort(-1).values)


@few
@given(scene=scenes(), data=st.data())
def test_candidates_are_the_pages_of_the_best_super_pages(
    scene: Scene, data: st.DataObject
) -> None:
    room = scene.coarse.rows.shape[2]
    num_supers = data.draw(st.integers(min(2, room), room))
    found = scene.candidates(num_supers)
    per_super = scene.flat_BHP.shape[2] // room
    assert (
        found.scores_BHP.shape
        == found.pages_BHP.shape
        == (
            *scene.flat_BHP.shape[:2],
            num_supers * per_super,
        )
    )
    assert_close(found.scores_BHP, scene.flat_BHP.gather(2, found.pages_BHP), equal_nan=True)
    coarse_BHC = scene.coarse.score(scene.query_BHE, rows=scene.coarse.rows)
    for b, num_full in enumerate(scene.num_full_B.tolist()):
        last = (num_full - 1) // per_super
        for scores_C, pages_P in zip(coarse_BHC[b], found.pages_BHP[b], strict=True):
            assert len(set(pages_P.tolist())) == len(pages_P)
            supers = set((pages_P // per_super).tolist())
            middle = sorted(range(1, last), key=lambda c: -scores_C[c])
            assert {0, last, *middle[: max(0, num_supers - 2)]} <= supers


def test_nothing_is_read_on_the_host() -> None:
    scene = make_scene([33, 9], frames_per_super=2)
    mode = FakeTensorMode()  # refuses what needs to know a value

    def fake(level: Level) -> Level:
        return level._make(part if part is None else mode.from_tensor(part) for part in level)

    with mode:
        found = score_coarse_to_fine(
            mode.from_tensor(scene.query_BHE),
            fine=fake(scene.fine),
            coarse=fake(scene.coarse),
            num_full_B=mode.from_tensor(scene.num_full_B),
            num_supers=3,
        )
    assert found.pages_BHP.shape == (2, HEADS, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("int8", [False, True])
def test_a_captured_graph_reads_new_lengths(int8: bool) -> None:
    scene = make_scene([40, 33], frames_per_super=1, int8=int8)
    fine, coarse = (
        level._make(part if part is None else part.cuda() for part in level)
        for level in (scene.fine, scene.coarse)
    )
    on_gpu = scene._replace(
        query_BHE=scene.query_BHE.cuda(),
        fine=fine,
        coarse=coarse,
        num_full_B=scene.num_full_B.cuda(),
    )
    on_gpu.candidates(4)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = on_gpu.candidates(4)
    for num_full in ([40, 33], [21, 30]):
        lengths_B = torch.tensor(num_full)
        on_gpu.num_full_B.copy_(lengths_B)
        graph.replay()
        expected = scene._replace(num_full_B=lengths_B).candidates(4)
        order, wanted = found.pages_BHP.cpu().sort(-1), expected.pages_BHP.sort(-1)
        assert torch.equal(order.values, wanted.values)
        assert_close(
            found.scores_BHP.cpu().gather(2, order.indices),
            expected.scores_BHP.gather(2, wanted.indices),
            equal_nan=True,
            atol=1e-4,
            rtol=1e-4,
        )


@few
@given(
    pages=st.sampled_from([1, 2, 5, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_a_super_page_scores_at_least_as_high_as_its_pages(
    pages: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pages_NPE = random_bounds(3, 2 * pages, generator=generator).to(dtype)
    query_1E = random_query(1, generator=generator).double()
    supers_NCE = super_summaries(pages_NPE, pages_per_super=pages)
    assert supers_NCE.shape == (3, 2, 2 * DIM) and supers_NCE.dtype == dtype
    of_pages_NCP = (pages_NPE.double() * query_1E).sum(-1).view(3, 2, pages)
    of_supers_NC = (supers_NCE.double() * query_1E).sum(-1)
    assert (of_supers_NC >= of_pages_NCP.amax(-1) - 1e-12).all()
    mean_NCE = super_summaries(pages_NPE, pages_per_super=pages, extremes=False)
    assert mean_NCE.dtype == dtype
    if dtype == torch.float32:
        assert_close((mean_NCE * query_1E).sum(-1), of_pages_NCP.mean(-1), atol=1e-5, rtol=0)


@few
@given(
    size=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 3e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_8_bits_are_off_by_half_a_scale_a_value(size: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    summaries_RXE = (size * random_bounds(7, 3, generator=generator)).to(dtype)
    steps_RXE, scales_RX = to_int8(summaries_RXE)
    assert steps_RXE.dtype == torch.int8 and scales_RX.dtype == torch.float16
    assert (scales_RX > 0).all() and scales_RX.isfinite().all()
    assert steps_RXE.abs().amax() <= 127
    scales_RX1 = scales_RX.double()[..., None]
    off_RXE = (steps_RXE.double() * scales_RX1 - summaries_RXE.double()).abs()
    # The largest values are cut by what float16 took from the scale.
    cut_RX1 = 127 * (scales_RX1 * 2**-11).clamp(min=2**-25)
    assert (off_RXE <= 0.5001 * scales_RX1 + cut_RX1).all()
    query_11E = random_query(1, 1, generator=generator)
    rows_11F = torch.arange(7).view(1, 1, 7)
    got_RX = score_pages(query_11E, steps_RXE, rows_BHF=rows_11F, scales_FX=scales_RX).view(7, 3)
    exact_RX = (summaries_RXE.double() * query_11E.double()).sum(-1)
    bound_RX = (0.5001 * scales_RX1 + cut_RX1)[..., 0] * query_11E.double().abs().sum()
    assert ((got_RX - exact_RX).abs() <= bound_RX + 1e-6 * size).all()


def test_8_bits_take_no_more_scale_than_a_127th() -> None:
    summaries_RXE = random_bounds(50, 4, generator=torch.Generator().manual_seed(0))
    _, scales_RX = to_int8(summaries_RXE)
    share_RX = 127 * scales_RX.double() / summaries_RXE.abs().amax(-1)
    assert ((share_RX - 1).abs() < 0.0005).all()


def test_super_pages_refuse_what_does_not_divide() -> None:
    scene = make_scene([33], frames_per_super=2)
    with pytest.raises(AssertionError):
        scene.candidates(1)
    with pytest.raises(AssertionError):
        scene.candidates(6)
    with pytest.raises(AssertionError):
        cut = scene.fine._replace(rows=scene.fine.rows[..., :-1].contiguous())
        scene._replace(fine=cut).candidates(3)
    with pytest.raises(AssertionError):
        super_summaries(torch.zeros(2, 10, 4), pages_per_super=4)
    with pytest.raises(AssertionError):
        super_summaries(torch.zeros(2, 8, 4, dtype=torch.int8), pages_per_super=4)
