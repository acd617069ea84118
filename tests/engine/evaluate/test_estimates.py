"""Attention that is estimated, clusters of keys, and what is learned of a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from sparsed.core import (
    BudgetRule,
    Choice,
    Evaluate,
    ExitCode,
    InputError,
    MetadataFormat,
    ModelShape,
    RankMethod,
)
from sparsed.engine.evaluate import evaluate
from sparsed.engine.evaluate.attend import LayerAttention
from sparsed.engine.evaluate.calibration import (
    Calibration,
    budget_factors,
    load_calibration,
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
from sparsed.engine.sparse.basis import Moments, product_basis

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
    keys_HDD, queries_HDD, _ = product_basis(Moments.of(q_NHGD, keys_HMD))
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
    keys_HDD, queries_HDD, _ = product_basis(Moments.of(q_NHGD, keys_HMD))
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
    found = read(file)
    assert found.tensors.keys() == made.tensors.keys()
    assert torch.equal(found.budget_factors(BudgetRule.HEAD, 0), torch.ones(1))
    uses: tuple[Callable[[], object], ...] = (
        lambda: found.gate(0),
        lambda: found.basis(0, 2),
        lambda: found.centre(0),
        lambda: found.budget_factors(BudgetRule.LAYER, 0),
    )
    for what in uses:
        with pytest.raises(InputError, match="the calibration has no") as caught:
            what()
        assert caught.value.field == "calibration"
    for wrong in (tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read(wrong)


def read(
    file: Path, *, num_heads: int = 2, num_kv_heads: int = 1, head_dim: int = 4
) -> Calibration:
    """As one of a model of one layer."""
    shape = ModelShape(
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=8,
        intermediate_size=8,
        vocab_size=8,
        max_position=8,
        num_parameters=8,
    )
    return load_calibration(file, device=torch.device("cpu"), shape=shape)


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "made.safetensors"
    gate = {"gate.keys": torch.ones(1, 1, 12, 3), "gate.queries": torch.ones(1, 1, 2, 4, 3)}
    save_calibration(Calibration(gate | {"budget.head": torch.ones(1, 1)}), file)
    assert read(file).gate(0)
    refused = {
        "budget.head has the shape (1, 1), and of this model it has (1, 2)": {"num_kv_heads": 2},
        "gate.keys has the shape (1, 1, 12, 3), and of this model it has (1, 1, 24, 3)": {
            "head_dim": 8
        },
        "gate.queries has the shape (1, 1, 2, 4, 3), and": {"num_heads": 4},
    }
    for words, sizes in refused.items():
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            read(file, **sizes)
        assert (caught.value.field, caught.value.code) == ("calibration", ExitCode.DATA)


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "made.safetensors"
    save_calibration(Calibration({"weights": torch.ones(1)}), file)
    with pytest.raises(InputError, match="nothing that one has") as caught:
        read(file)
    assert caught.value.code == ExitCode.DATA
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="cannot be read") as caught:
        read(file)
    assert caught.value.code == ExitCode.DATA


def test_a_calibration_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    made = Calibration({"budget.head": torch.ones(1, 1)})
    file, link = tmp_path / "made", tmp_path / "link"
    link.symlink_to(file)
    save_calibration(made, link)
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, file]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    for wrong in (tmp_path / "full", tmp_path / "missing" / "made"):
        with pytest.raises(InputError, match="cannot be written"):
            save_calibration(made, wrong)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "full", link, file]


@pytest.mark.parametrize(("method", "dims"), [(RankMethod.GATE, 64), (RankMethod.MEAN, None)])
def test_gates_are_learned_where_one_is_used(
    method: RankMethod, dims: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def calibrate(*_: object, gate_dims: int | None, **__: object) -> Calibration:
        asked.append(gate_dims)
        return Calibration({})

    monkeypatch.setattr(evaluate, "calibrate", calibrate)
    wanted = Evaluate(
        model="",
        cache_dir="",
        device="cpu",
        dtype="float32",
        choices=(Choice(method=RankMethod.ORACLE), Choice(method=method)),
        texts=("code", "questions"),
        context_tokens=100,
        scored_tokens=10,
        num_windows=2,
    )
    made = evaluate.learn(wanted, Mock(), [], on_progress=lambda _phase, _frac: None)
    assert asked == [dims]
    assert made.learned_from == {"code": "2 windows of 100 + 10"}
