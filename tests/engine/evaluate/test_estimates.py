"""Attention that is estimated, clusters of keys, and what is learned of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsed.core import BudgetRule, Choice, InputError, MetadataFormat, RankMethod
from sparsed.engine.evaluate.attend import LayerAttention
from sparsed.engine.evaluate.calibration import (
    Calibration,
    budget_factors,
    load_calibration,
    product_basis,
    save_calibration,
)
from sparsed.engine.evaluate.clusters import (
    RECENT_TOKENS,
    SINK_TOKENS,
    UNIT_TOKENS,
    ClusterMethod,
)
from sparsed.engine.evaluate.estimates import PageEstimate, log_mass
from sparsed.engine.evaluate.methods import Methods

H, G, D, M, FIRST = 2, 2, 16, 512, 448
SCALE = D**-0.5
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(*, equal_tokens: int = 1) -> Inputs:
    """Queries of the last positions, keys, values; runs of ``equal_tokens`` keys are equal."""
    generator = torch.Generator().manual_seed(0)
    q_nHGD = 2 * torch.randn((M - FIRST, H, G, D), generator=generator)
    keys_HMD = torch.randn((H, M // equal_tokens, D), generator=generator)
    values_HMD = torch.randn((H, M, D), generator=generator)
    return q_nHGD, keys_HMD.repeat_interleave(equal_tokens, 1), values_HMD


def attend(found: Inputs, choice: Choice) -> tuple[Tensor, ...]:
    q_nHGD, keys_HMD, values_HMD = found
    methods = Methods(choice, num_layers=1, num_tokens=FIRST, scale=SCALE)
    method = methods.open(0, keys_HMD, values_HMD)
    return LayerAttention(keys_HMD, values_HMD, method, scale=SCALE)(q_nHGD, first=FIRST)


def softmax_weights(q_nHGD: Tensor, keys_HMD: Tensor) -> Tensor:
    logits = torch.einsum("nhgd,hmd->nhgm", q_nHGD, keys_HMD) * SCALE
    future = torch.arange(M) > torch.arange(FIRST, M)[:, None]
    return logits.masked_fill(future[:, None, None], float("-inf")).softmax(-1)


# -- estimates -------------------------------------------------------------------------------


def test_the_mass_is_what_softmax_divides_by() -> None:
    q_nHGD, keys_HMD, _ = inputs()
    logits = torch.einsum("nhgd,hmd->nhgm", q_nHGD, keys_HMD) * SCALE
    future = torch.arange(M) > torch.arange(FIRST, M)[:, None]
    exact = logits.masked_fill(future[:, None, None], float("-inf")).logsumexp(-1)
    found = log_mass(q_nHGD, softmax_weights(q_nHGD, keys_HMD), keys_HMD, scale=SCALE)
    torch.testing.assert_close(found, exact)


def test_pages_of_equal_keys_are_estimated_exactly() -> None:
    found = inputs(equal_tokens=16)
    quiet = Choice(method=RankMethod.MEAN, share=1 / 4, page_size=16)
    _, recall_nHG, error_nHG, reads_nH, _ = attend(found, quiet)
    assert recall_nHG.max() < 0.999 and error_nHG.min() > 1e-3
    loud = Choice(method=RankMethod.MEAN, share=1 / 4, page_size=16, estimated=1.0)
    _, same_nHG, exact_nHG, more_nH, _ = attend(found, loud)
    assert exact_nHG.max() < 1e-4
    assert torch.equal(same_nHG, recall_nHG)  # recall is of what is read
    assert (more_nH > reads_nH).all()


def test_estimates_help_where_keys_are_alike() -> None:
    q_nHGD, keys_HMD, values_HMD = inputs(equal_tokens=16)
    keys_HMD = keys_HMD + 0.1 * torch.randn(
        keys_HMD.shape, generator=torch.Generator().manual_seed(5)
    )
    errors = [
        attend(
            (q_nHGD, keys_HMD, values_HMD),
            Choice(method=RankMethod.MEAN, share=1 / 4, page_size=16, estimated=part),
        )[2].mean()
        for part in (0.0, 0.25, 0.5)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_next_best_pages_are_estimated() -> None:
    _, keys_HMD, values_HMD = inputs()
    estimate = PageEstimate(keys_HMD, values_HMD, page_size=16, num_pages=3, scale=SCALE)
    scores = torch.tensor([5.0, 1, float("-inf"), 4, 3, 2]).expand(1, H, -1)
    assert estimate.next_best(scores)[0, 0].tolist() == [True, False, False, True, True, False]
    few = torch.tensor([5.0, *[float("-inf")] * 5]).expand(1, H, -1)
    assert estimate.reads(estimate.next_best(few)).tolist() == [[1.0] * H]


# -- clusters --------------------------------------------------------------------------------


def clusters(found: Inputs, *, budget: float, estimated: float = 0.0) -> ClusterMethod:
    return ClusterMethod(
        found[1],
        found[2],
        num_tokens=FIRST,
        budget_tokens=budget,
        estimated_tokens=estimated,
        metadata=MetadataFormat.BF16,
        scale=SCALE,
    )


@pytest.mark.parametrize("budget", [100, 200, 300])
def test_clusters_stay_within_their_budget(budget: int) -> None:
    found = inputs()
    q_nHGD, keys_HMD, _ = found
    method = clusters(found, budget=budget)
    chosen = method.choose(q_nHGD, softmax_weights(q_nHGD, keys_HMD), first=FIRST)
    past_nM = torch.arange(M) <= torch.arange(FIRST, M)[:, None]
    read_nHM = chosen.attended_nHM & past_nM[:, None]
    assert torch.equal(chosen.reads_nH, read_nHM.sum(-1).float())
    assert (chosen.reads_nH <= budget + UNIT_TOKENS).all()  # units that are not full yet
    assert chosen.reads_nH.mean() > 0.5 * budget
    assert read_nHM[..., :SINK_TOKENS].all()
    for i, position in enumerate(range(FIRST, M)):
        assert read_nHM[i, :, position - RECENT_TOKENS + 1 : position + 1].all()


def test_clusters_find_like_keys() -> None:
    """Keys of few kinds, shuffled: a cluster holds one kind, so nearly all attention is read."""
    generator = torch.Generator().manual_seed(1)
    kinds = 4 * torch.randn((8, D), generator=generator)
    keys_HMD = kinds[torch.randint(8, (H, M), generator=generator)]
    q_nHGD, _, values_HMD = inputs()
    found = (q_nHGD, keys_HMD, values_HMD)
    clustered = attend(found, Choice(method=RankMethod.CLUSTERS, share=1 / 2))
    paged = attend(found, Choice(method=RankMethod.MEAN, share=1 / 2, page_size=16))
    assert clustered[1].mean() > paged[1].mean() + 0.1


def test_clusters_of_equal_keys_are_estimated_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn((4, D), generator=generator)
    keys_HMD = kinds[torch.randint(4, (H, M), generator=generator)].bfloat16().float()
    q_nHGD, _, values_HMD = inputs()
    method = clusters((q_nHGD, keys_HMD, values_HMD), budget=200, estimated=M)
    attention = LayerAttention(keys_HMD, values_HMD, method, scale=SCALE)
    _, recall_nHG, error_nHG, *_ = attention(q_nHGD, first=FIRST)
    assert recall_nHG.min() < 0.9
    assert error_nHG.max() < 1e-2  # centres are kept in bf16


# -- calibrations ----------------------------------------------------------------------------


def test_a_basis_of_full_rank_gives_the_products_back() -> None:
    """Up to a constant of the query: keys are centred."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn((D, D), generator=generator)
    q_NHGD = torch.randn((300, H, G, D), generator=generator) @ mix
    keys_HMD = torch.randn((H, M, D), generator=generator) @ mix.T + 5
    keys_HDD, queries_HDD = product_basis(q_NHGD, keys_HMD)
    exact = torch.einsum("nhgd,hmd->nhgm", q_NHGD, keys_HMD)
    found = torch.einsum("nhgr,hmr->nhgm", *_mapped(q_NHGD, keys_HMD, queries_HDD, keys_HDD))
    off = found - exact
    off = off - off.mean(-1, keepdim=True)
    exact = exact - exact.mean(-1, keepdim=True)
    assert off.norm() < 1e-2 * exact.norm()


def test_the_first_dims_of_a_basis_are_the_best() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = 2.0 ** -torch.arange(D)
    rotation = torch.linalg.qr(torch.randn((D, D), generator=generator)).Q
    q_NHGD = torch.randn((300, H, G, D), generator=generator)
    keys_HMD = (torch.randn((H, M, D), generator=generator) * sizes) @ rotation
    keys_HDD, queries_HDD = product_basis(q_NHGD, keys_HMD)
    exact = torch.einsum("nhgd,hmd->nhgm", q_NHGD, keys_HMD)
    errors = []
    for dims in (1, 2, 4, 8, 16):
        parts = _mapped(q_NHGD, keys_HMD, queries_HDD[..., :dims], keys_HDD[..., :dims])
        errors.append(float((torch.einsum("nhgr,hmr->nhgm", *parts) - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.1 < errors[0]


def _mapped(
    q_NHGD: Tensor, keys_HMD: Tensor, queries_HDR: Tensor, keys_HDR: Tensor
) -> tuple[Tensor, Tensor]:
    return q_NHGD @ queries_HDR, keys_HMD @ keys_HDR


def test_budgets_are_one_in_the_mean_and_go_where_they_gain() -> None:
    generator = torch.Generator().manual_seed(4)
    steep = torch.rand((3, 4, 1), generator=generator) * 0.5
    curves_LHP = torch.exp(-steep * torch.arange(64.0))
    curves_LHP /= curves_LHP.sum(-1, keepdim=True)
    factors = budget_factors(curves_LHP, share=1 / 8)
    assert factors.keys() == {f"budget.{BudgetRule.LAYER}", f"budget.{BudgetRule.HEAD}"}
    for factors_LH in factors.values():
        assert factors_LH.shape == (3, 4)
        assert float(factors_LH.mean()) == pytest.approx(1.0)
        assert (factors_LH >= 0).all()
    layer_LH = factors["budget.layer"]
    assert torch.equal(layer_LH, layer_LH[:, :1].expand_as(layer_LH))
    counts_LH = (factors["budget.head"] * 64 / 8).round().long()
    read_LHP = torch.arange(64) < counts_LH[..., None]
    assert curves_LHP[read_LHP].min() >= curves_LHP[~read_LHP].max()
    assert len(counts_LH.unique()) > 3


def test_a_calibration_is_read_back(tmp_path: Path) -> None:
    made = Calibration({"basis.keys": torch.eye(4)[None, None], "budget.head": torch.ones(1, 1)})
    file = tmp_path / "made.safetensors"
    save_calibration(made, file)
    found = load_calibration(file, device=torch.device("cpu"))
    assert found.tensors.keys() == made.tensors.keys()
    assert torch.equal(found.budget_factors(BudgetRule.HEAD, 0), torch.ones(1))
    read: tuple[Callable[[], object], ...] = (
        lambda: found.gate(0),
        lambda: found.basis(0, 2),
        lambda: found.budget_factors(BudgetRule.LAYER, 0),
    )
    for what in read:
        with pytest.raises(InputError, match="the calibration has no") as caught:
            what()
        assert caught.value.field == "calibration"
    for wrong in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_calibration(wrong, device=torch.device("cpu"))
