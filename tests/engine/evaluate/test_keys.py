"""The keys that ``sparsed eval`` takes of a method are those that change what it does."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from sparsed.controller.evaluate.choices import TAKES
from sparsed.core import (
    MEAN_KEY,
    BudgetRule,
    Choice,
    GroupRule,
    MetadataFormat,
    RankMethod,
    SparseMethod,
)
from sparsed.engine.evaluate.attend import LayerAttention
from sparsed.engine.evaluate.calibration import Calibration
from sparsed.engine.evaluate.methods import Methods
from sparsed.engine.kvcache.geometry import KEPT_DIMS
from sparsed.engine.sparse.base import SINK_PAGES, recent_pages

H, G, D, R = 2, 2, 16, 4  # KV heads, query heads of each, head dim, kept dims of a gate
NUM_CONTEXT, NUM_TOKENS = 1024, 1152
SCALE = D**-0.5
CHANGES: dict[str, object] = {
    "share": 1 / 4,
    "page_size": 8,
    "grain": 8,
    "group_rule": GroupRule.SOFTMAX_MAX,
    "metadata": MetadataFormat.INT4,
    "kept_dims": 4,
    "variance_weight": 9.0,
    "budgets": BudgetRule.HEAD,
    "dense_layers": 1,
    "super_pages": 2,
    "coarse": 1.0,
    "estimated": 1 / 4,
    "sink_pages": 6,
    "recent_pages": 6,
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens after the context, keys and values."""
    generator = torch.Generator().manual_seed(0)
    q_nHGD = 2 * torch.randn((NUM_TOKENS - NUM_CONTEXT, H, G, D), generator=generator)
    return q_nHGD, *(torch.randn((H, NUM_TOKENS, D), generator=generator) for _ in range(2))


def calibration(keys_HMD: Tensor) -> Calibration:
    """The centre is that of the text, so that taking it or not is the same."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.linalg.qr(torch.randn((1, H, D, D), generator=generator)).Q
    return Calibration(
        {
            "basis.keys": maps,
            "basis.queries": maps,
            "basis.centre": keys_HMD[None, :, :NUM_CONTEXT].mean(2),
            "budget.head": torch.tensor([[1.2, 0.8]]),
            "gate.keys": torch.randn((1, H, 3 * D, R), generator=generator),
            "gate.queries": torch.randn((1, H, G, D, R), generator=generator),
        }
    )


def behaviour(choice: Choice) -> list[Tensor]:
    """Outputs, reads, selected pages and bytes of summaries."""
    q_nHGD, keys_HMD, values_HMD = inputs()
    methods = Methods(
        choice,
        num_layers=2,
        num_tokens=NUM_CONTEXT,
        scale=SCALE,
        calibration=calibration(keys_HMD),
    )
    method = methods.open(0, keys_HMD, values_HMD)
    attention = LayerAttention(keys_HMD, values_HMD, method, scale=SCALE)
    o_nHGD, _, _, reads_nH, pages_nHK = attention(q_nHGD, first=NUM_CONTEXT)
    return [o_nHGD, reads_nH, pages_nHK, torch.tensor(method.metadata_bytes)]


@pytest.mark.parametrize(
    ("method", "key"),
    [pair for pair in product(RankMethod, CHANGES) if pair[0] is not RankMethod.DENSE],
)
def test_a_key_is_taken_where_it_changes_something(method: RankMethod, key: str) -> None:
    base = Choice(method=method, share=5 / 8, super_pages=2 if key == "coarse" else 0)
    changed = replace(base, **{key: CHANGES[key]})  # type: ignore[arg-type]  # of each its type
    same = all(torch.equal(*pair) for pair in zip(behaviour(base), behaviour(changed), strict=True))
    assert same == (key not in TAKES[method])


def test_the_default_is_that_of_an_engine() -> None:
    assert MEAN_KEY.kept_dims == KEPT_DIMS
    assert MEAN_KEY.sink_pages == SINK_PAGES
    assert MEAN_KEY.recent_pages == recent_pages(MEAN_KEY.page_size)
    assert MEAN_KEY.written(share=False) == SparseMethod.MEAN_KEY
