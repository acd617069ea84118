"""What is kept of a page's keys, and how much attention it lets one expect of the page.

A summary answers, for every query head, an estimate of the logarithm of the page's softmax mass,
in logits not divided by the square root of the head dim, up to a constant of the query. How the
query heads of a group agree on one ranking is the next step (``groups.py``).

Shape legend: n positions, H KV heads, G query heads per KV head, U units (pages, or the sub-pages
they are cut into), S runs of X units, T tokens of a unit, D head dim, E values kept of a unit,
R kept dims.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sparsed.kernels.reference_mean_keys import round_queries


class Summary(Protocol):
    """Metadata of the units of one layer. Keys are rotated, float32. ``signs``: the equal parts
    of a summary, each with a scale of its own where bits are few; false: never negative."""

    @property
    def signs(self) -> tuple[bool, ...]: ...

    def build(self, keys_HUTD: Tensor) -> Tensor:
        """What is kept: (H, U, E)."""
        ...

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        """One summary (H, S, E) of every X neighbouring units."""
        ...

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        """Estimates (n, H, G, U), larger where more attention is expected."""
        ...


class Extremes:
    """Element-wise largest and smallest key; the estimate bounds every q.k from above.

    Source: Quest, arXiv 2406.10774.
    """

    signs: tuple[bool, ...] = (True,)

    def build(self, keys_HUTD: Tensor) -> Tensor:
        return torch.cat((keys_HUTD.amax(2), keys_HUTD.amin(2)), dim=-1)

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        upper_HSXD, lower_HSXD = summary_HSXE.chunk(2, dim=-1)
        return torch.cat((upper_HSXD.amax(2), lower_HSXD.amin(2)), dim=-1)

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        return bound(q_nHGD, summary_HUE)


class CuboidMean:
    """The centre of the extremes plus and minus the mean distance to it.

    Source: ArkVale, NeurIPS 2024.
    """

    signs: tuple[bool, ...] = (True,)

    def build(self, keys_HUTD: Tensor) -> Tensor:
        centre_HU1D = (keys_HUTD.amax(2, keepdim=True) + keys_HUTD.amin(2, keepdim=True)) / 2
        radius_HUD = (keys_HUTD - centre_HU1D).abs().mean(2)
        centre_HUD = centre_HU1D[:, :, 0]
        return torch.cat((centre_HUD + radius_HUD, centre_HUD - radius_HUD), dim=-1)

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        return summary_HSXE.mean(2)

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        return bound(q_nHGD, summary_HUE)


class MeanAndSpread:
    """The mean plus and minus ``spreads`` standard deviations of each dimension."""

    signs: tuple[bool, ...] = (True,)

    def __init__(self, spreads: float = 1.0) -> None:
        self._spreads = spreads

    def build(self, keys_HUTD: Tensor) -> Tensor:
        mean_HUD = keys_HUTD.mean(2)
        spread_HUD = keys_HUTD.std(2, correction=0) * self._spreads
        return torch.cat((mean_HUD + spread_HUD, mean_HUD - spread_HUD), dim=-1)

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        return summary_HSXE.mean(2)

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        return bound(q_nHGD, summary_HUE)


class Mean:
    """The mean key (ShadowKV, arXiv 2410.21465, keeps the same)."""

    signs: tuple[bool, ...] = (True,)

    def build(self, keys_HUTD: Tensor) -> Tensor:
        return keys_HUTD.mean(2)

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        return summary_HSXE.mean(2)

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        return dot(q_nHGD, summary_HUE)


class Variance:
    """The mean key, and the standard deviation of each dimension. The logarithm of the mean of
    exp(q.k) over keys that are normal is q.mean + var(q.k) / 2, taken here without covariances;
    ``weight`` of the second term. Best in a basis where covariances are small (``Rotated``)."""

    signs: tuple[bool, ...] = (True, False)

    def __init__(self, weight: float, *, scale: float) -> None:
        self._factor = weight * scale / 2

    def build(self, keys_HUTD: Tensor) -> Tensor:
        return torch.cat((keys_HUTD.mean(2), keys_HUTD.std(2, correction=0)), dim=-1)

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        mean_HSXD, spread_HSXD = summary_HSXE.chunk(2, dim=-1)
        variance_HSD = spread_HSXD.square().mean(2) + mean_HSXD.var(2, correction=0)
        return torch.cat((mean_HSXD.mean(2), variance_HSD.sqrt()), dim=-1)

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        mean_HUD, spread_HUD = summary_HUE.chunk(2, dim=-1)
        gain_nHGU = dot(q_nHGD.square(), spread_HUD.square())
        return dot(q_nHGD, mean_HUD) + self._factor * gain_nHGU


class Rotated:
    """Another summary of keys in a basis of their own, of which only the first dims are kept.

    ``keys_HDR`` and ``queries_HDR`` take keys and queries there; the products of what they give
    approximate q.k. ``rounds_queries``: to eight bits, as the kernel of mean keys does.
    Source of the idea: Loki, arXiv 2406.02542; ShadowKV.
    """

    def __init__(
        self, inner: Summary, *, keys_HDR: Tensor, queries_HDR: Tensor, rounds_queries: bool
    ) -> None:
        self.signs = inner.signs
        self._rounds_queries = rounds_queries
        self._inner = inner
        self._keys_HDR = keys_HDR
        self._queries_HDR = queries_HDR

    def build(self, keys_HUTD: Tensor) -> Tensor:
        return self._inner.build(keys_HUTD @ self._keys_HDR[:, None])

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        return self._inner.merge(summary_HSXE)

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        q_nHGR = q_nHGD @ self._queries_HDR
        return self._inner.estimate(
            round_queries(q_nHGR) if self._rounds_queries else q_nHGR, summary_HUE
        )


class EveryKey:
    """All keys of a unit, worth keeping in a basis of few dims (``Rotated``) alone."""

    signs: tuple[bool, ...] = (True,)

    def __init__(self, *, scale: float) -> None:
        self._scale = scale

    def build(self, keys_HUTD: Tensor) -> Tensor:
        return keys_HUTD.flatten(2)

    def merge(self, summary_HSXE: Tensor) -> Tensor:
        return summary_HSXE.mean(2)

    def estimate(self, q_nHGD: Tensor, summary_HUE: Tensor) -> Tensor:
        num_heads, num_units, _ = summary_HUE.shape
        keys_HVD = summary_HUE.reshape(num_heads, -1, q_nHGD.shape[-1])
        logits_nHGV = dot(q_nHGD, keys_HVD) * self._scale
        logits_nHGUT = torch.unflatten(logits_nHGV, -1, (num_units, -1))
        return logits_nHGUT.logsumexp(-1) / self._scale


def dot(q_nHGD: Tensor, units_HUD: Tensor) -> Tensor:
    """q.k of every query head with every unit of its KV head: (n, H, G, U)."""
    num_positions, _, group, _ = q_nHGD.shape
    q_HRD = q_nHGD.transpose(0, 1).flatten(1, 2)
    products_HRU = q_HRD @ units_HUD.transpose(1, 2)
    return torch.unflatten(products_HRU, 1, (num_positions, group)).transpose(0, 1)


def bound(q_nHGD: Tensor, bounds_HUE: Tensor) -> Tensor:
    """sum over d of max(q_d * upper_d, q_d * lower_d): (n, H, G, U)."""
    parts_nHGE = torch.cat((q_nHGD.clamp(min=0), q_nHGD.clamp(max=0)), dim=-1)
    return dot(parts_nHGE, bounds_HUE)
