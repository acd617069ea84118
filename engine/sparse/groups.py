"""How the query heads that share a KV head agree on one ranking of its pages.

Shape legend: n positions, H KV heads, G query heads per KV head, U units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.core import GroupRule


def agree(estimates_nHGU: Tensor, rule: GroupRule, *, scale: float) -> Tensor:
    """Scores (n, H, U), larger is better. Estimates of units that do not exist are -inf;
    ``scale`` makes logits of them."""
    if rule is GroupRule.MEAN:
        return estimates_nHGU.mean(2)
    if rule is GroupRule.MAX:
        return estimates_nHGU.amax(2)
    shares_nHGU = torch.softmax(estimates_nHGU * scale, dim=-1)
    if rule is GroupRule.SOFTMAX_SUM:
        return shares_nHGU.sum(2)
    if rule is GroupRule.SOFTMAX_MAX:
        return shares_nHGU.amax(2)
    return _turns(shares_nHGU)


def _turns(shares_nHGU: Tensor) -> Tensor:
    """A unit's best rank with any head, and among equals the share that head gives it."""
    ranks_nHGU = shares_nHGU.argsort(dim=-1, descending=True).argsort(dim=-1)
    return shares_nHGU.amax(2) - ranks_nHGU.amin(2)
