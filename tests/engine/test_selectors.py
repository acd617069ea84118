"""What selectors keep of pages and estimate from it, against the plain arithmetic.

Shape legend: N page rows, T tokens of a page, C = 2 (key, value), D head dim, B requests, H KV
heads, G query heads per KV head, P pages, R kept dims, L layers, F frames of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsed.core import PAGE_SIZES, SparseMethod
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.sparse.base import Selector, recent_pages
from sparsed.engine.sparse.basis import Basis
from sparsed.engine.sparse.selectors import make_selector
from sparsed.kernels.levels import to_levels
from sparsed.kernels.reference_mean_keys import round_queries

MakeBasis = Callable[[Geometry], Basis]
LAYERS, HEADS, GROUP = 2, 3, 2
FRAMES = 6
RANKED = (SparseMethod.MEAN_KEY, SparseMethod.CUBOID_MEAN, SparseMethod.QUEST)


class Case(NamedTuple):
    """A selector that has seen every page of the pool; request b has ``num_full[b]`` full pages in
    the frames of row ``rows[b]``."""

    selector: Selector
    geometry: Geometry
    basis: Basis
    frames_RF: Tensor
    pages_NTCD: Tensor
    q_BHGD: Tensor
    rows_B: Tensor
    num_full_B: Tensor

    def keys(self, b: int, *, layer: int) -> Tensor:
        """Keys (H, P, T, D) of the request's pages in a layer."""
        per_frame, frames = self.geometry.pages_per_block, self.frames_RF[int(self.rows_B[b])]
        lanes = layer * HEADS + torch.arange(HEADS)
        page_P = torch.arange(int(self.num_full_B[b]))
        row_HP = frames[page_P // per_frame] * self.geometry.num_lanes + lanes[:, None]
        return self.pages_NTCD[row_HP * per_frame + page_P % per_frame, :, 0]


def new_case(
    method: SparseMethod, make_basis: MakeBasis, *, page_size: int, head_dim: int, seed: int
) -> Case:
    torch.manual_seed(seed)
    geometry = Geometry(
        num_layers=LAYERS, num_kv_heads=HEADS, head_dim=head_dim, page_size=page_size, element_bytes=4
    )  # fmt: skip
    per_frame = geometry.pages_per_block
    # Two rows of three frames each, and a spare row of spare frames.
    spare_F = torch.full((3,), FRAMES)
    frames_RF = torch.cat((torch.randperm(FRAMES), spare_F)).view(3, 3).int()
    basis = make_basis(geometry)
    selector = make_selector(
        method,
        geometry=geometry,
        frames_RF=frames_RF,
        num_frames=FRAMES,
        dtype=torch.float32,
        basis=basis,
    )
    assert selector is not None
    num_rows = (FRAMES + 1) * geometry.page_rows_per_frame
    pages_NTCD = torch.randn(num_rows, page_size, 2, head_dim)
    order_N = torch.randperm(num_rows)
    for part_M in order_N.split(num_rows // 3 + 1):
        selector.summarise(pages_NTCD[part_M], part_M)
    num_full_B = torch.randint(0, 3 * per_frame + 1, (3,), dtype=torch.int32)
    num_full_B[0] = 3 * per_frame
    return Case(
        selector,
        geometry,
        basis,
        frames_RF,
        pages_NTCD,
        2 * torch.randn(3, HEADS, GROUP, head_dim),
        torch.tensor([1, 0, 1], dtype=torch.int32),
        num_full_B,
    )


def select(case: Case, *, layer: int, count: int = 9) -> Tensor:
    """Pages (B, H, K) of each lane, rising, then -1."""
    count_B = torch.full_like(case.num_full_B, count)
    out_BHK = torch.full((len(case.num_full_B), HEADS, count), 77, dtype=torch.int32)
    case.selector.select(
        case.q_BHGD,
        layer=layer,
        rows_B=case.rows_B,
        num_full_B=case.num_full_B,
        count_B=count_B,
        max_pages=3 * case.geometry.pages_per_block,
        out_BHK=out_BHK,
    )
    return out_BHK.masked_fill(out_BHK < 0, 999).sort(dim=-1).values.masked_fill(out_BHK < 0, -1)


def check_best(case: Case, pages_HK: Tensor, scores_HP: Tensor) -> None:
    """The sink page, the recent ones, and the best of the others, but for rounding."""
    num_full = scores_HP.shape[1]
    count = min(pages_HK.shape[1], num_full)
    recent = recent_pages(case.geometry.page_size)
    scores_HP = scores_HP.clone()
    scores_HP[:, :1] = scores_HP[:, max(num_full - recent, 0) :] = float("inf")
    for pages_K, scores_P in zip(pages_HK, scores_HP, strict=True):
        chosen = pages_K[:count].long()
        assert len(set(chosen.tolist())) == count and (pages_K[count:] == -1).all()
        rest = scores_P[[page for page in range(num_full) if page not in chosen.tolist()]]
        if count and len(rest):
            assert scores_P[chosen].min() >= rest.max() * 0.98 - 1e-6


cases = {
    "page_size": st.sampled_from(PAGE_SIZES),
    "layer": st.integers(0, LAYERS - 1),
    "seed": st.integers(0, 999),
}


@settings(max_examples=25)
@given(head_dim=st.sampled_from((4, 6, 16, 64)), **cases)
def test_the_best_pages_by_mean_keys_are_selected(
    make_basis: MakeBasis, page_size: int, head_dim: int, layer: int, seed: int
) -> None:
    """Of keys in 7 levels either way, and queries in 127."""
    case = new_case(
        SparseMethod.MEAN_KEY, make_basis, page_size=page_size, head_dim=head_dim, seed=seed
    )
    keys_HDR, queries_HDR, centre_HD = (part[layer] for part in case.basis)
    for b, pages_HK in enumerate(select(case, layer=layer)):
        means_HPD = case.keys(b, layer=layer).mean(2) - centre_HD[:, None]
        levels_HPR, scale_HP1 = to_levels(means_HPD @ keys_HDR, 7)
        q_HGR = round_queries(case.q_BHGD[b] @ queries_HDR)
        logits_HGP = q_HGR @ (levels_HPR * scale_HP1).mT * head_dim**-0.5
        check_best(case, pages_HK, logits_HGP.softmax(-1).sum(1))


@settings(max_examples=25)
@given(minmax=st.booleans(), **cases)
def test_the_best_pages_by_bounds_are_selected(
    make_basis: MakeBasis, page_size: int, layer: int, seed: int, minmax: bool
) -> None:
    method = SparseMethod.QUEST if minmax else SparseMethod.CUBOID_MEAN
    case = new_case(method, make_basis, page_size=page_size, head_dim=8, seed=seed)
    for b, pages_HK in enumerate(select(case, layer=layer)):
        keys = case.keys(b, layer=layer)
        if not keys.shape[1]:
            assert (pages_HK == -1).all()
            continue
        low, high = keys.amin(2), keys.amax(2)
        if not minmax:
            centre = (low + high) / 2
            radius = (keys - centre[:, :, None]).abs().mean(2)
            low, high = centre - radius, centre + radius
        q = case.q_BHGD[b][:, :, None]
        scores_HP = torch.maximum(q * low[:, None], q * high[:, None]).sum(-1).mean(1)
        check_best(case, pages_HK, scores_HP - scores_HP.amin(-1, keepdim=True) + 1)


@pytest.mark.parametrize("method", RANKED)
def test_writes_to_the_spare_frame_change_nothing(
    make_basis: MakeBasis, method: SparseMethod
) -> None:
    case = new_case(method, make_basis, page_size=16, head_dim=8, seed=1)
    before = select(case, layer=1)
    per_frame = case.geometry.page_rows_per_frame
    spare_M = torch.arange(FRAMES * per_frame, (FRAMES + 1) * per_frame)
    # More than once, too, and rows of nobody.
    spare_M = torch.cat((spare_M, spare_M[:5], torch.full((7,), -1)))
    case.selector.summarise(100 * torch.randn(len(spare_M), 16, 2, 8), spare_M)
    assert torch.equal(select(case, layer=1), before)


@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_store_is_as_large_as_was_planned(
    make_basis: MakeBasis, method: SparseMethod, page_size: int
) -> None:
    case = new_case(method, make_basis, page_size=page_size, head_dim=64, seed=1)
    planned = (FRAMES + 1) * case.geometry.summary_bytes_per_frame(method)
    assert case.selector.store_bytes == planned > 0


def test_summaries_of_many_pages_are_those_of_each_alone(make_basis: MakeBasis) -> None:
    """More than one part of what is summarised at once."""
    case = new_case(SparseMethod.MEAN_KEY, make_basis, page_size=8, head_dim=8, seed=1)
    before = select(case, layer=0)
    page_rows_N = torch.arange(len(case.pages_NTCD)).repeat(2)
    case.selector.summarise(case.pages_NTCD.repeat(2, 1, 1, 1), page_rows_N)
    assert len(page_rows_N) > 1024
    assert torch.equal(select(case, layer=0), before)


@pytest.mark.parametrize(("page_size", "pages"), [(8, 8), (16, 4), (64, 1), (128, 1)])
def test_recent_pages_hold_64_tokens(page_size: int, pages: int) -> None:
    assert recent_pages(page_size) == pages


def test_dense_ranks_nothing(make_basis: MakeBasis) -> None:
    geometry = Geometry(num_layers=1, num_kv_heads=1, head_dim=8, page_size=8, element_bytes=4)
    frames_RF = torch.zeros(1, 1, dtype=torch.int32)
    parts = {"geometry": geometry, "frames_RF": frames_RF, "num_frames": 1}
    assert make_selector(SparseMethod.DENSE, dtype=torch.float32, **parts) is None
