"""Attention over both tiers against plain attention over lists of keys, under random requests.

Shape legend: N tokens of a step, H KV heads, G query heads per KV head, D head dim, M tokens of a
request, P full pages, T tokens of a page, C = 2 (key, value).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsed.core import PAGE_SIZES, RECALL_STRIDE, SparseMethod
from sparsed.engine.attention import Attention
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.decode import sampled_layer, sampled_turn
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.sparse.basis import Basis
from sparsed.kernels.reference_mean_keys import round_queries

MakeBasis = Callable[..., Basis]
MakeCache = Callable[..., KVCache]
NUM_LAYERS, NUM_HEADS, GROUP, HEAD_DIM = 2, 2, 2, 4
SCALE = HEAD_DIM**-0.5
MAX_LEN = 1024
CLEAR_MARGINS = {  # between the last page that is chosen and the first that is not
    SparseMethod.CUBOID_MEAN: 1e-4,
    SparseMethod.MEAN_KEY: 1e-6,
}


@dataclass
class Life:
    """A request and every key and value it has had, per layer."""

    row: int
    prompt: int
    total: int
    kv_MHCD: list[Tensor] = field(
        default_factory=lambda: [torch.empty(0, NUM_HEADS, 2, HEAD_DIM)] * NUM_LAYERS
    )
    length: int = 0


def plain_attention(q_HGD: Tensor, kv_MHCD: Tensor, seen_HM: Tensor) -> tuple[Tensor, Tensor]:
    """(output (H, G, D), log-sum-exp (H, G)) over the tokens that each head sees."""
    logits_HGM = torch.einsum("hgd,mhd->hgm", q_HGD * SCALE, kv_MHCD[:, :, 0])
    logits_HGM = logits_HGM.masked_fill(~seen_HM[:, None], float("-inf"))
    o_HGD = torch.einsum("hgm,mhd->hgd", logits_HGM.softmax(-1), kv_MHCD[:, :, 1])
    return o_HGD, logits_HGM.logsumexp(-1)


def seen_by_selection(
    scores_HP: Tensor, *, num_tokens: int, page_size: int, count: int
) -> tuple[Tensor, float]:
    """The tokens (H, M) that are attended to, and the margin of the choice: the first page, the
    newest 64 tokens or the newest page, and the partial page always."""
    num_full = scores_HP.shape[1]
    scores_HP[:, 0] = float("inf")
    scores_HP[:, -max(1, 64 // page_size) :] = float("inf")
    ranked_HP = scores_HP.sort(descending=True, stable=True)
    margin = (ranked_HP.values[:, count - 1] - ranked_HP.values[:, count]).min()
    seen_HM = torch.zeros(NUM_HEADS, num_tokens, dtype=torch.bool)
    seen_HM[:, num_full * page_size :] = True
    for head in range(NUM_HEADS):
        for page in ranked_HP.indices[head, :count].tolist():
            seen_HM[head, page * page_size : (page + 1) * page_size] = True
    return seen_HM, float(margin)


def cuboid_scores(q_HGD: Tensor, keys_PTHD: Tensor) -> Tensor:
    low_PHD, high_PHD = keys_PTHD.amin(1), keys_PTHD.amax(1)
    center_PHD = (low_PHD + high_PHD) / 2
    radius_PHD = (keys_PTHD - center_PHD[:, None]).abs().mean(1)
    upper, lower = (q_HGD * (center_PHD + sign * radius_PHD)[:, :, None] for sign in (1, -1))
    return torch.maximum(upper, lower).sum(-1).mean(-1).T


def mean_key_scores(
    q_HGD: Tensor, keys_PTHD: Tensor, basis_HDR: Tensor, centre_HD: Tensor
) -> Tensor:
    """The votes of the group; NaN where a mean is too near to the edge of two codes."""
    means_HPD = (keys_PTHD.mean(1) - centre_HD).transpose(0, 1)
    means_HPR = means_HPD @ basis_HDR
    scale_HP1 = (means_HPR.abs().amax(-1, keepdim=True) / 7).half().float()
    steps_HPR = means_HPR / scale_HP1
    off_HPR = (steps_HPR - steps_HPR.floor() - 0.5).abs()
    q_HGR = round_queries(q_HGD @ basis_HDR)
    estimates_HGP = q_HGR @ (steps_HPR.round() * scale_HP1).mT * SCALE
    votes_HP = estimates_HGP.softmax(-1).sum(1)
    return votes_HP if off_HPR.min() > 1e-5 else torch.full_like(votes_HP, float("nan"))


class World:
    """Requests that come and go over one cache, each step compared with plain attention."""

    def __init__(self, cache: KVCache, basis: Basis, *, dense_layers: int, seed: int) -> None:
        self.cache = cache
        self.basis = basis
        self.method = SparseMethod(cache._knobs.sparse_method)
        self.page_size = cache.geometry.page_size
        self.dense_layers = dense_layers
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.lives: list[Life] = []
        self.step = 0
        self.checked = 0  # sparse outputs of a layer
        self.attention = Attention(
            cache,
            staging_NX=torch.empty(
                2 * NUM_HEADS * cache.geometry.pages_per_block, cache.arena.pages_NX.shape[1]
            ),
            dense_layers=dense_layers,
            scale=SCALE,
        )

    def come(self) -> None:
        prompt = int(self.rng.integers(1, 16 * self.page_size))
        total = min(prompt + int(self.rng.integers(1, 6 * self.page_size)), MAX_LEN)
        budget = int(self.rng.choice((0, 4, 5, 12))) * self.page_size or None  # None: the knob's
        dense = self.rng.random() < 0.3
        method = SparseMethod.DENSE if dense else self.method
        if self.cache.can_admit(total, method=method, token_budget=budget):
            self.admit(min(prompt, total - 1), total, budget=budget, dense=dense)

    def admit(self, prompt: int, total: int, *, budget: int | None, dense: bool) -> None:
        method = SparseMethod.DENSE if dense else self.method
        row = self.cache.add(total, method=method, token_budget=budget)
        self.lives.append(Life(row=row, prompt=prompt, total=total))

    def go(self, chance: float) -> None:
        for life in list(self.lives):
            if life.length == life.total or self.rng.random() < chance:
                self.cache.free(life.row)
                self.lives.remove(life)

    def squeeze(self) -> None:
        token_budget = max(256, 4 * self.page_size) * int(self.rng.choice((1, 2)))
        hbm_budget = None if self.rng.random() < 0.5 else token_budget
        knobs = replace(self.cache._knobs, token_budget=token_budget, hbm_budget=hbm_budget)
        self.cache.apply(knobs)

    def compute(self) -> None:
        self.step += 1
        prefills = [life for life in self.lives if life.length < life.prompt]
        decodes = [life for life in self.lives if life.length >= life.prompt]
        sizes = [int(self.rng.integers(1, life.prompt - life.length + 1)) for life in prefills]
        plan = StepPlan(
            chunks=tuple(map(self.chunk, prefills, sizes)),
            decodes=tuple(
                DecodeRow(row=life.row, token=0, position=life.length) for life in decodes
            ),
        )
        for decode in plan.decodes:
            self.cache.make_room(decode.row, decode.position)
            self.cache.open_token(decode.row, decode.position)
        attention = self.attention.plan(plan, step=self.step)
        num_tokens = [*sizes, *[1] * len(decodes)]
        for layer in range(NUM_LAYERS):
            q_NHGD = torch.randn(sum(num_tokens), NUM_HEADS, GROUP, HEAD_DIM) * 2
            kv_NHCD = torch.randn(sum(num_tokens), NUM_HEADS, 2, HEAD_DIM)
            q = q_NHGD.flatten(1, 2)
            o = self.attention.run(attention, layer, q, kv_NHCD[:, :, 0], kv_NHCD[:, :, 1])
            parts = zip(
                [*prefills, *decodes],
                *(x.split(num_tokens) for x in (q_NHGD, kv_NHCD, o.view_as(q_NHGD))),
                strict=True,
            )
            for life, q_nHGD, kv_nHCD, o_nHGD in parts:
                life.kv_MHCD[layer] = torch.cat((life.kv_MHCD[layer], kv_nHCD))
                self.check(life, layer, q_nHGD, o_nHGD)
        self.attention.finish(plan.decodes, step=self.step)
        for life in self.lives:
            life.length = len(life.kv_MHCD[0])

    def chunk(self, life: Life, size: int) -> PromptChunk:
        return PromptChunk(
            row=life.row,
            tokens=(0,) * size,
            start=life.length,
            prompt_length=life.prompt,
            logits_from=life.length + size,
        )

    def check(self, life: Life, layer: int, q_nHGD: Tensor, o_nHGD: Tensor) -> None:
        kv_MHCD, row = life.kv_MHCD[layer], self.cache.rows[life.row]
        if life.length >= life.prompt:
            count = row.token_budget // self.page_size - 1
            sparse = row.method != SparseMethod.DENSE and layer >= self.dense_layers
            if sparse and life.length // self.page_size > count:
                self.check_sparse(life, layer, q_nHGD[0], o_nHGD[0], count)
                return
        for i in {0, len(q_nHGD) - 1}:  # the tokens between them are in the same product
            seen_HM = torch.ones(NUM_HEADS, len(kv_MHCD), dtype=torch.bool)
            seen_HM[:, life.length + i + 1 :] = False
            expected, _ = plain_attention(q_nHGD[i], kv_MHCD, seen_HM)
            torch.testing.assert_close(o_nHGD[i], expected, atol=1e-4, rtol=1e-4)

    def check_sparse(
        self, life: Life, layer: int, q_HGD: Tensor, o_HGD: Tensor, count: int
    ) -> None:
        kv_MHCD = life.kv_MHCD[layer]
        num_full = (len(kv_MHCD) - 1) // self.page_size
        keys_PTHD = kv_MHCD[: num_full * self.page_size, :, 0].unflatten(0, (num_full, -1))
        if self.method is SparseMethod.MEAN_KEY:
            basis_HDR, centre_HD = self.basis.keys_LHDR[layer], self.basis.centre_LHD[layer]
            scores_HP = mean_key_scores(q_HGD, keys_PTHD, basis_HDR, centre_HD)
        else:
            scores_HP = cuboid_scores(q_HGD, keys_PTHD)
        if scores_HP.isnan().any():
            return
        seen_HM, margin = seen_by_selection(
            scores_HP, num_tokens=len(kv_MHCD), page_size=self.page_size, count=count
        )
        if margin < CLEAR_MARGINS[self.method]:
            return
        expected, lse = plain_attention(q_HGD, kv_MHCD, seen_HM)
        torch.testing.assert_close(o_HGD, expected, atol=1e-4, rtol=1e-4)
        self.checked += 1
        turn = sampled_turn(self.step, RECALL_STRIDE)
        if turn is not None and layer == sampled_layer(turn, NUM_LAYERS):
            _, dense_lse = plain_attention(q_HGD, kv_MHCD, torch.ones_like(seen_HM))
            expected_recall = float(torch.exp(lse - dense_lse).mean())
            recalls = self.cache.rows[life.row].recalls
            assert recalls[-1] == pytest.approx(expected_recall, abs=1e-4)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    page_size=st.sampled_from(PAGE_SIZES),
    lane_blocks=st.integers(2, 12),
    dense_layers=st.integers(0, 1),
    method=st.sampled_from((SparseMethod.MEAN_KEY, SparseMethod.CUBOID_MEAN)),
    seed=st.integers(0, 2**16),
)
def test_attention(
    make_cache: MakeCache,
    make_basis: MakeBasis,
    page_size: int,
    lane_blocks: int,
    dense_layers: int,
    method: SparseMethod,
    seed: int,
) -> None:
    cache = make_cache(
        lane_blocks=lane_blocks,
        num_frames=24,
        page_size=page_size,
        token_budget=max(256, 4 * page_size),
        sparse_method=method,
    )
    world = World(cache, make_basis(cache.geometry), dense_layers=dense_layers, seed=seed)
    for step in range(70):
        if step % 3 == 0:
            world.come()
        world.go(chance=0.02)
        if step % 10 == 9:
            world.squeeze()
        if world.lives:
            world.compute()
        cache.check_integrity()
    world.go(chance=1.0)
    assert len(cache.arena.blocks) == cache.arena.blocks.size


@pytest.mark.parametrize("method", [SparseMethod.MEAN_KEY, SparseMethod.CUBOID_MEAN])
@pytest.mark.parametrize(
    ("budget", "dense", "missed", "overflow"),
    [(128, False, True, False), (384, False, True, True), (128, True, False, False)],
)
def test_a_request_alone_on_eight_slots(
    make_cache: MakeCache,
    make_basis: MakeBasis,
    budget: int,
    dense: bool,
    missed: bool,
    overflow: bool,
    method: SparseMethod,
) -> None:
    """Three pages fit and come and go, eleven take passes, dense streams all of them."""
    cache = make_cache(lane_blocks=2, num_frames=24, token_budget=256, sparse_method=method)
    world = World(cache, make_basis(cache.geometry), dense_layers=0, seed=1)
    world.admit(500, 600, budget=budget, dense=dense)
    while world.lives:
        world.compute()
        world.go(chance=0.0)
    counts = world.attention.counts
    assert (world.checked > 100) == (not dense)
    _, num_missed, num_evicted, num_refused = counts.resolved.read()
    assert (num_missed > 0, num_refused > 0) == (missed, overflow)
    assert (num_evicted > 0, counts.recall_samples > 0) == (missed, missed)
    assert cache.transfer.h2d[0] > 0
