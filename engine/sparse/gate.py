"""A learned estimate of a unit's attention: pooled keys and the query through learned maps.

The idea is SeerAttention-R's (arXiv 2506.08889); here the maps take rotated keys and queries, each
query head has a map of its own, and its estimate is of that head's attention.

Shape legend: n positions, H KV heads, G query heads per KV head, U units, T tokens of a unit,
D head dim, E = 3 D pooled values, R dims of the maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.engine.sparse.summaries import dot


class Gate:
    """``keys_HER`` maps the mean, largest and smallest key of a unit, ``queries_HGDR`` the
    query; what is kept of a unit are R values."""

    signs: tuple[bool, ...] = (True,)

    def __init__(self, keys_HER: Tensor, queries_HGDR: Tensor) -> None:
        self._keys_HER = keys_HER
        self._queries_HGDR = queries_HGDR

    def build(self, keys_HUTD: Tensor) -> Tensor:
        return pool(keys_HUTD) @ self._keys_HER

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        return summary_HSXE.mean(2)

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        return dot(map_queries(q_nHGD, self._queries_HGDR), summary_HUE)


def pool(keys_HUTD: Tensor) -> Tensor:
    """Mean, largest and smallest key of each unit: (H, U, 3 D)."""
    return torch.cat((keys_HUTD.mean(2), keys_HUTD.amax(2), keys_HUTD.amin(2)), dim=-1)


def map_queries(q_nHGD: Tensor, queries_HGDR: Tensor) -> Tensor:
    """Every query head through its own map: (n, H, G, R)."""
    return torch.einsum("nhgd,hgdr->nhgr", q_nHGD, queries_HGDR)
