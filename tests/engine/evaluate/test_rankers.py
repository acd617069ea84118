"""Rankings by summaries: as the engine ranks, in few bits, in two passes, by groups of heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsed.core import (
    BLOCK_TOKENS,
    Choice,
    GroupRule,
    MetadataFormat,
    RankMethod,
)
from sparsed.engine.evaluate.rankers import (
    CoarseToFineRanker,
    OracleRanker,
    RandomRanker,
    SummaryRanker,
)
from sparsed.engine.evaluate.select import select_pages
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.sparse.bounds import BoundSelector
from sparsed.engine.sparse.groups import agree
from sparsed.engine.sparse.metadata import round_trip, unit_bytes
from sparsed.engine.sparse.summaries import (
    CuboidMean,
    EveryKey,
    Extremes,
    Mean,
    MeanAndSpread,
    Rotated,
    Summary,
    Variance,
)
from sparsed.kernels.levels import MIN_SCALE

H, G, D, M, N = 2, 3, 16, 512, 24
SCALE = D**-0.5
SUMMARIES: tuple[Summary, ...] = (
    Extremes(),
    CuboidMean(),
    Mean(),
    MeanAndSpread(),
    Variance(1.0, scale=SCALE),
    EveryKey(scale=SCALE),
)


@pytest.fixture
def q_nHGD() -> Tensor:
    return 2 * torch.randn((N, H, G, D), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def keys_HMD() -> Tensor:
    """With a mean far from 0, as rotated keys have."""
    generator = torch.Generator().manual_seed(1)
    noise, mean_D = (torch.randn(size, generator=generator) for size in ((H, M, D), (D,)))
    return noise + 3 * mean_D


def ranker(keys_HMD: Tensor, summary: Summary, **values: object) -> SummaryRanker:
    base = Choice(method=RankMethod.MEAN, page_size=16)
    choice = replace(base, **values)  # type: ignore[arg-type]  # fields by name
    return SummaryRanker(keys_HMD, summary, choice, num_tokens=M, scale=SCALE)


def full(num_pages: int) -> Tensor:
    return torch.full((N,), num_pages)


@pytest.mark.parametrize("method", ["cuboid-mean", "quest"])
@pytest.mark.parametrize("page_size", [8, 32])
def test_ranks_as_the_selector_of_the_engine(
    method: str, page_size: int, q_nHGD: Tensor, keys_HMD: Tensor
) -> None:
    """Scores differ by a constant of the query and KV head: the mean key is taken off here."""
    geometry = Geometry(
        num_layers=1, num_kv_heads=H, head_dim=D, page_size=page_size, element_bytes=4
    )
    num_frames = M // BLOCK_TOKENS
    selector = BoundSelector(
        minmax=method == "quest",
        geometry=geometry,
        frames_RF=torch.arange(num_frames, dtype=torch.int32)[None],
        num_frames=num_frames,
        dtype=torch.float32,
    )
    pages_MTCD = keys_HMD.reshape(-1, page_size, 1, D).expand(-1, -1, 2, -1)
    pages_HFP = torch.arange(len(pages_MTCD)).view(num_frames, H, -1).transpose(0, 1)
    selector.summarise(pages_MTCD, pages_HFP.flatten())
    engine_nHP = selector.score(
        q_nHGD,
        layer=0,
        rows_B=torch.zeros(N, dtype=torch.int32),
        num_full_B=full(M // page_size).int(),
    )
    summary = Extremes() if method == "quest" else CuboidMean()
    ours = ranker(keys_HMD, summary, page_size=page_size, metadata=MetadataFormat.FP32)
    scores_nHP = ours.score(q_nHGD, None, num_full_n=full(M // page_size))
    difference_nHP = engine_nHP - scores_nHP
    spread_nH = difference_nHP.amax(-1) - difference_nHP.amin(-1)
    assert spread_nH.max() < 1e-3
    assert difference_nHP.abs().max() > 1


@pytest.mark.parametrize("summary", SUMMARIES, ids=lambda item: type(item).__name__)
def test_equal_keys_are_summarised_exactly(summary: Summary, q_nHGD: Tensor) -> None:
    """A unit of equal keys has its q.k for an estimate, up to a constant."""
    key_HUD = torch.randn((H, 8, D), generator=torch.Generator().manual_seed(2))
    units_HUTD = key_HUD[:, :, None].expand(-1, -1, 4, -1)
    estimates_nHGU = summary.estimate(q_nHGD, summary.build(units_HUTD))
    exact_nHGU = torch.einsum("nhgd,hud->nhgu", q_nHGD, key_HUD)
    off_nHGU = estimates_nHGU - exact_nHGU
    torch.testing.assert_close(off_nHGU, off_nHGU[..., :1].expand_as(off_nHGU), atol=1e-4, rtol=0)
    merged_HSE = summary.merge(torch.unflatten(summary.build(units_HUTD), 1, (-1, 2))[:, :, :1])
    torch.testing.assert_close(
        summary.estimate(q_nHGD, merged_HSE), estimates_nHGU[..., ::2], atol=1e-4, rtol=1e-4
    )


def test_every_key_is_the_logarithm_of_the_mass(q_nHGD: Tensor, keys_HMD: Tensor) -> None:
    units_HUTD = torch.unflatten(keys_HMD, 1, (-1, 16))
    summary = EveryKey(scale=SCALE)
    estimates_nHGU = summary.estimate(q_nHGD, summary.build(units_HUTD))
    logits_nHGM = torch.einsum("nhgd,hmd->nhgm", q_nHGD, keys_HMD) * SCALE
    exact_nHGU = torch.unflatten(logits_nHGM, -1, (-1, 16)).logsumexp(-1)
    torch.testing.assert_close(estimates_nHGU * SCALE, exact_nHGU)


def test_extremes_bound_every_product(q_nHGD: Tensor, keys_HMD: Tensor) -> None:
    units_HUTD = torch.unflatten(keys_HMD, 1, (-1, 16))
    summary_HUE = Extremes().build(units_HUTD)
    products_nHGM = torch.einsum("nhgd,hmd->nhgm", q_nHGD, keys_HMD)
    largest_nHGU = torch.unflatten(products_nHGM, -1, (-1, 16)).amax(-1)
    assert (Extremes().estimate(q_nHGD, summary_HUE) >= largest_nHGU - 1e-4).all()
    runs_HSE = Extremes().merge(torch.unflatten(summary_HUE, 1, (-1, 4)))
    largest_nHGS = torch.unflatten(largest_nHGU, -1, (-1, 4)).amax(-1)
    assert (Extremes().estimate(q_nHGD, runs_HSE) >= largest_nHGS - 1e-4).all()


@pytest.mark.parametrize("name", ["Mean", "Variance", "Extremes"])
def test_merged_summaries_are_those_of_the_longer_unit(name: str, keys_HMD: Tensor) -> None:
    summary = {type(item).__name__: item for item in SUMMARIES}[name]
    short_HUE = summary.build(torch.unflatten(keys_HMD, 1, (-1, 8)))
    merged_HSE = summary.merge(torch.unflatten(short_HUE, 1, (-1, 4)))
    long_HSE = summary.build(torch.unflatten(keys_HMD, 1, (-1, 32)))
    torch.testing.assert_close(merged_HSE, long_HSE, atol=1e-5, rtol=1e-5)


def test_a_basis_of_all_dims_changes_nothing(q_nHGD: Tensor, keys_HMD: Tensor) -> None:
    rotation_DD = torch.linalg.qr(torch.randn((D, D))).Q
    maps = rotation_DD.expand(H, -1, -1)
    plain = ranker(keys_HMD, Mean()).score(q_nHGD, None, num_full_n=full(M // 16))
    rotated = Rotated(Mean(), keys_HDR=maps, queries_HDR=maps, rounds_queries=False)
    found = ranker(keys_HMD, rotated).score(q_nHGD, None, num_full_n=full(M // 16))
    torch.testing.assert_close(found, plain, atol=0.2, rtol=0.02)  # both are kept in bf16
    few = Rotated(Mean(), keys_HDR=maps[..., :4], queries_HDR=maps[..., :4], rounds_queries=False)
    assert ranker(keys_HMD, few).metadata_bytes == 4 * 2 / 16


def test_a_page_ranks_by_its_best_unit(q_nHGD: Tensor, keys_HMD: Tensor) -> None:
    fine = ranker(keys_HMD, Mean(), page_size=8).score(q_nHGD, None, num_full_n=full(M // 8))
    cut = ranker(keys_HMD, Mean(), page_size=32, grain=8)
    scores_nHP = cut.score(q_nHGD, None, num_full_n=full(M // 32))
    torch.testing.assert_close(scores_nHP, torch.unflatten(fine, -1, (-1, 4)).amax(-1))
    assert cut.metadata_bytes == D * 2 / 8


# -- two passes ------------------------------------------------------------------------------


def coarse_to_fine(keys_HMD: Tensor, summary: Summary, num_runs: int) -> CoarseToFineRanker:
    choice = Choice(method=RankMethod.MEAN, page_size=16, super_pages=4)
    return CoarseToFineRanker(
        keys_HMD, summary, choice, num_tokens=M, scale=SCALE, num_runs=num_runs
    )


@pytest.mark.parametrize("summary", SUMMARIES, ids=lambda item: type(item).__name__)
@pytest.mark.parametrize("num_full", [M // 16, M // 16 - 3])
def test_all_runs_are_the_flat_ranking(
    summary: Summary, num_full: int, q_nHGD: Tensor, keys_HMD: Tensor
) -> None:
    flat = ranker(keys_HMD, summary).score(q_nHGD, None, num_full_n=full(num_full))
    found = coarse_to_fine(keys_HMD, summary, 99).score(q_nHGD, None, num_full_n=full(num_full))
    assert torch.equal(found, flat)


def test_few_runs_hold_the_first_and_the_last(q_nHGD: Tensor, keys_HMD: Tensor) -> None:
    num_full = M // 16 - 2
    coarse = coarse_to_fine(keys_HMD, CuboidMean(), 4)
    scores_nHP = coarse.score(q_nHGD, None, num_full_n=full(num_full))
    kept_nHS = torch.unflatten(scores_nHP > float("-inf"), -1, (-1, 4)).any(-1)
    assert (kept_nHS.sum(-1) == 4).all()
    assert kept_nHS[..., 0].all() and kept_nHS[..., (num_full - 1) // 4].all()
    flat = ranker(keys_HMD, CuboidMean())
    assert coarse.metadata_bytes == flat.metadata_bytes * (1 + 1 / 4)


# -- groups ----------------------------------------------------------------------------------


def test_the_oracle_sums_the_mass_of_a_group() -> None:
    mass_nHGP = torch.rand((N, H, G, 9)).softmax(-1)
    scores = OracleRanker(GroupRule.SOFTMAX_SUM, scale=SCALE).score(
        torch.zeros(N, H, G, D), mass_nHGP, num_full_n=full(9)
    )
    torch.testing.assert_close(scores, mass_nHGP.sum(2))


@pytest.mark.parametrize("rule", GroupRule)
def test_a_group_of_one_ranks_as_its_head(rule: GroupRule) -> None:
    estimates_nH1U = torch.randn((N, H, 1, 20))
    estimates_nH1U[..., 15:] = float("-inf")
    order = agree(estimates_nH1U, rule, scale=SCALE)[..., :15].argsort(-1)
    assert torch.equal(order, estimates_nH1U[:, :, 0, :15].argsort(-1))


@pytest.mark.parametrize("rule", GroupRule)
def test_units_that_do_not_exist_rank_last(rule: GroupRule) -> None:
    estimates_nHGU = torch.randn((N, H, G, 20))
    estimates_nHGU[..., 15:] = float("-inf")
    scores = agree(estimates_nHGU, rule, scale=SCALE)
    assert (scores[..., :15].amin(-1) >= scores[..., 15:].amax(-1)).all()


def test_heads_take_turns() -> None:
    estimates_nHGU = torch.randn((N, H, G, 20))
    best = agree(estimates_nHGU, GroupRule.QUOTA, scale=SCALE).topk(G).indices
    for favourite in estimates_nHGU.argmax(-1).unbind(-1):
        assert (best == favourite[..., None]).any(-1).all()


# -- few bits --------------------------------------------------------------------------------

STEPS = {  # largest error, as a part of the largest value of the unit
    MetadataFormat.FP32: 0.0,
    MetadataFormat.BF16: 2.0**-8,
    MetadataFormat.FP8: 2.0**-4,
    MetadataFormat.INT8: 0.5 / 127 + 1e-3,
    MetadataFormat.INT4: 0.5 / 7 + 1e-3,
}


@pytest.mark.parametrize("kind", MetadataFormat)
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_a_round_trip_is_close(kind: MetadataFormat, size: float) -> None:
    summary_HUE = size * torch.randn((H, 50, 2 * D), generator=torch.Generator().manual_seed(3))
    error_HUE = (round_trip(summary_HUE, kind, signs=(True,)) - summary_HUE).abs()
    largest_HU1 = summary_HUE.abs().amax(-1, keepdim=True)
    assert (error_HUE <= STEPS[kind] * largest_HU1 + MIN_SCALE / 2).all()
    assert torch.equal(round_trip(0 * summary_HUE, kind, signs=(True,)), 0 * summary_HUE)


def test_fp32_changes_nothing() -> None:
    summary_HUE = torch.randn((H, 50, 2 * D), generator=torch.Generator().manual_seed(3))
    assert torch.equal(round_trip(summary_HUE, MetadataFormat.FP32, signs=(True,)), summary_HUE)


def test_a_part_without_a_sign_has_twice_the_levels() -> None:
    parts = torch.rand((H, 50, 2 * D), generator=torch.Generator().manual_seed(4))
    parts[..., :D] *= 100  # a scale of its own: the second part does not suffer
    found = round_trip(parts, MetadataFormat.INT4, signs=(True, False))
    error = (found - parts).abs()
    assert error[..., :D].max() <= 100 * (0.5 / 7 + 1e-3)
    assert error[..., D:].max() <= 0.5 / 15 + 1e-3
    assert (found[..., D:] >= 0).all()


def test_bytes_of_a_unit() -> None:
    assert unit_bytes(32, MetadataFormat.FP32, num_parts=2) == 128
    assert unit_bytes(32, MetadataFormat.BF16, num_parts=2) == 64
    assert unit_bytes(32, MetadataFormat.INT8, num_parts=2) == 32 + 4
    assert unit_bytes(32, MetadataFormat.FP8, num_parts=1) == 32 + 2
    assert unit_bytes(32, MetadataFormat.INT4, num_parts=1) == 16 + 2


def test_more_ranks_than_full_pages_are_padded() -> None:
    """A position with few full pages lists them all, and none that is not full."""
    scores_nHP = torch.rand((3, 2, 20))
    num_full_n = torch.tensor([5, 12, 19])
    pages_nHK = select_pages(
        scores_nHP,
        num_full_n=num_full_n,
        counts_H=torch.tensor([12, 7]),
        choice=Choice(method=RankMethod.ORACLE),
    )
    for position, num_full in enumerate(num_full_n.tolist()):
        for head, count in enumerate((12, 7)):
            listed = [page for page in pages_nHK[position, head].tolist() if page >= 0]
            assert len(listed) == len(set(listed)) == min(count, num_full)
            assert max(listed) < num_full


def test_random_pages_are_drawn_anew() -> None:
    ranker = RandomRanker(num_pages=50, seed=3, device=torch.device("cpu"))
    q_nHGD, num_full_n = torch.zeros((4, 2, 3, 8)), torch.tensor([40, 40, 40, 40])
    first, second = (ranker.score(q_nHGD, None, num_full_n=num_full_n) for _ in range(2))
    assert first.shape == (4, 2, 50)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
