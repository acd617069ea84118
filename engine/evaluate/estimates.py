"""Attention to units that are not read, estimated from their mean key and the sum of their values.

Shape legend: n positions, H KV heads, G query heads per KV head, D head dim, M tokens, U units,
P pages, E = D + 1 (values, and their weight).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.core import MetadataFormat
from sparsed.engine.sparse.metadata import VALUE_BYTES
from sparsed.engine.sparse.summaries import dot


def log_mass(q_nHGD: Tensor, weights_nHGM: Tensor, keys_HMD: Tensor, *, scale: float) -> Tensor:
    """Logarithm of the sum of exp(logits) that the softmax weights were divided by: (n, H, G)."""
    largest_nHG, tokens_nHG = weights_nHGM.max(-1)
    heads_H11 = torch.arange(len(keys_HMD), device=keys_HMD.device)[:, None]
    keys_nHGD = keys_HMD[heads_H11, tokens_nHG]
    return (q_nHGD * keys_nHGD).sum(-1) * scale - largest_nHG.log()


def estimate_units(
    logits_nHGU: Tensor, log_mass_nHG: Tensor, *, values_HUE: Tensor, wanted_nHU: Tensor
) -> Tensor:
    """exp(logit of the mean key) times the sum of the values, and times their number, of the
    wanted units, in softmax weights: (n, H, G, E). ``values_HUE``: sums of values, and numbers."""
    weights_nHGU = (logits_nHGU - log_mass_nHG[..., None]).exp() * wanted_nHU[:, :, None]
    group = weights_nHGU.shape[2]
    mixed_HRE = weights_nHGU.transpose(0, 1).flatten(1, 2) @ values_HUE
    return torch.unflatten(mixed_HRE, 1, (-1, group)).transpose(0, 1)


class PageEstimate:
    """The ``num_pages`` full pages ranked next after those that are read. ``metadata_bytes``: of
    a mean key and a value sum of each page in bfloat16, per token."""

    def __init__(
        self, keys_HMD: Tensor, values_HMD: Tensor, *, page_size: int, num_pages: int, scale: float
    ) -> None:
        values_HPD = torch.unflatten(values_HMD, 1, (-1, page_size)).sum(2)
        sizes_HP1 = torch.full_like(values_HPD[..., :1], page_size)
        self.metadata_bytes = 2 * keys_HMD.shape[-1] * VALUE_BYTES[MetadataFormat.BF16] / page_size
        self._keys_HMD = keys_HMD
        self._means_HPD = torch.unflatten(keys_HMD, 1, (-1, page_size)).mean(2)
        self._values_HPE = torch.cat((values_HPD, sizes_HP1), dim=-1)
        self._num_pages = num_pages
        self._scale = scale

    def next_best(self, scores_nHP: Tensor) -> Tensor:
        """Which pages are estimated, of those that do not score -inf: (n, H, P), bool."""
        best = scores_nHP.topk(min(self._num_pages, scores_nHP.shape[-1]))
        found_nHP = torch.zeros_like(scores_nHP, dtype=torch.bool)
        return found_nHP.scatter_(-1, best.indices, best.values > float("-inf"))

    def __call__(self, q_nHGD: Tensor, weights_nHGM: Tensor, wanted_nHP: Tensor) -> Tensor:
        """What they add to the sums of weighted values and of weights: (n, H, G, E)."""
        scale = self._scale
        return estimate_units(
            dot(q_nHGD, self._means_HPD) * scale,
            log_mass(q_nHGD, weights_nHGM, self._keys_HMD, scale=scale),
            values_HUE=self._values_HPE,
            wanted_nHU=wanted_nHP,
        )

    def reads(self, wanted_nHP: Tensor) -> Tensor:
        """K and V that a page estimate reads, as tokens: its mean key and value sum are one."""
        return wanted_nHP.sum(-1).float()
