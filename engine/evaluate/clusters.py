"""Clusters of like keys instead of pages: ranked by their centres, read whole, the next ones
estimated. Source: RetroInfer, arXiv 2505.02922 (segments, sizes, sinks and window as there).

Shape legend: n positions, H KV heads, G query heads per KV head, D head dim, M tokens, S segments,
T tokens of a segment, C clusters of a segment, U units (clusters, then short pages of what came
after the text), E = D + 1 (values, and their weight).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sparsed.core import MetadataFormat
from sparsed.engine.evaluate.attend import Chosen
from sparsed.engine.evaluate.estimates import estimate_units, log_mass
from sparsed.engine.sparse.metadata import VALUE_BYTES, round_trip, unit_bytes
from sparsed.engine.sparse.summaries import dot

SEGMENT_TOKENS: Final = 8192
UNIT_TOKENS: Final = 16
ROUNDS: Final = 10
SINK_TOKENS: Final = 4
RECENT_TOKENS: Final = 64


class ClusterMethod:
    """``num_tokens`` of the keys are clustered; those after them are units of neighbours once they
    are full. Budgets are in tokens: units are taken best first while they fit."""

    def __init__(
        self,
        keys_HMD: Tensor,
        values_HMD: Tensor,
        *,
        num_tokens: int,
        budget_tokens: float,
        estimated_tokens: float,
        metadata: MetadataFormat,
        scale: float,
    ) -> None:
        self._keys_HMD = keys_HMD
        self._scale = scale
        self._num_tokens = num_tokens
        self._units_HM, self._num_clusters = _units(keys_HMD, num_tokens)
        num_units = int(self._units_HM.max()) + 1
        ones_HM1 = torch.ones_like(keys_HMD[..., :1])
        sums_HUE = _sum_units(torch.cat((keys_HMD, ones_HM1), -1), self._units_HM, num_units)
        self._sizes_HU = sums_HUE[..., -1]
        centres_HUD = sums_HUE[..., :-1] / self._sizes_HU.clamp(min=1)[..., None]
        self._centres_HUD = round_trip(centres_HUD, metadata, signs=(True,))
        self._values_HME = torch.cat((values_HMD, ones_HM1), -1)
        self._budget_tokens = budget_tokens - SINK_TOKENS - RECENT_TOKENS
        self._estimated_tokens = estimated_tokens
        head_dim = keys_HMD.shape[-1]
        self.metadata_bytes = unit_bytes(head_dim, metadata, num_parts=1) / UNIT_TOKENS
        if estimated_tokens:  # sums of values as well
            self.metadata_bytes += head_dim * VALUE_BYTES[MetadataFormat.BF16] / UNIT_TOKENS

    def choose(self, q_nHGD: Tensor, weights_nHGM: Tensor, *, first: int) -> Chosen:
        positions_n = torch.arange(first, first + len(q_nHGD), device=q_nHGD.device)
        logits_nHGU = dot(q_nHGD, self._centres_HUD) * self._scale
        num_full_n = self._num_clusters + (positions_n - self._num_tokens) // UNIT_TOKENS
        units_U = torch.arange(logits_nHGU.shape[-1], device=q_nHGD.device)
        absent_nU = units_U >= num_full_n[:, None]
        logits_nHGU.masked_fill_(absent_nU[:, None, None], float("-inf"))
        scores_nHU = torch.softmax(logits_nHGU, dim=-1).sum(2)
        read_nHU, estimated_nHU = self._take(scores_nHU)
        units_nHM = self._units_HM.expand(len(q_nHGD), -1, -1)
        attended_nHM = read_nHU.gather(-1, units_nHM)
        attended_nHM |= self._always(positions_n)[:, None]
        past_nM = torch.arange(attended_nHM.shape[-1], device=q_nHGD.device) <= positions_n[:, None]
        reads_nH = (attended_nHM & past_nM[:, None]).sum(-1) + estimated_nHU.sum(-1)
        chosen = Chosen(attended_nHM, reads_nH.float(), positions_n.new_empty((*reads_nH.shape, 0)))
        if not self._estimated_tokens:
            return chosen
        mass_nHG = log_mass(q_nHGD, weights_nHGM, self._keys_HMD, scale=self._scale)
        units_nHGM = units_nHM[:, :, None].expand(-1, -1, q_nHGD.shape[2], -1)
        estimate_nHGE = estimate_units(  # of single tokens: some of a unit may be read anyway
            logits_nHGU.gather(-1, units_nHGM),
            mass_nHG,
            values_HUE=self._values_HME,
            wanted_nHU=estimated_nHU.gather(-1, units_nHM) & ~attended_nHM,
        )
        return chosen._replace(estimate_nHGE=estimate_nHGE)

    def _take(self, scores_nHU: Tensor) -> tuple[Tensor, Tensor]:
        """Units that are read, and those that are estimated, best first."""
        order_nHU = scores_nHU.argsort(dim=-1, descending=True)
        sizes_nHU = self._sizes_HU.expand(len(order_nHU), -1, -1).gather(-1, order_nHU)
        tokens_nHU = sizes_nHU.cumsum(-1)
        exist_nHU = scores_nHU.gather(-1, order_nHU) > 0
        read_nHU = exist_nHU & (tokens_nHU <= self._budget_tokens)
        most = self._budget_tokens + self._estimated_tokens
        estimated_nHU = exist_nHU & (tokens_nHU <= most) & ~read_nHU
        empty_nHU = torch.zeros_like(read_nHU)
        return (
            empty_nHU.scatter(-1, order_nHU, read_nHU),
            empty_nHU.scatter(-1, order_nHU, estimated_nHU),
        )

    def _always(self, positions_n: Tensor) -> Tensor:
        """Sinks, the newest tokens and what is in no full unit yet: (n, M)."""
        tokens_M = torch.arange(self._units_HM.shape[1], device=positions_n.device)
        recent_nM = tokens_M > positions_n[:, None] - RECENT_TOKENS
        return recent_nM | (tokens_M < SINK_TOKENS)


def _units(keys_HMD: Tensor, num_tokens: int) -> tuple[Tensor, int]:
    """The unit (H, M) of every token, and how many of the units are clusters."""
    num_heads, num_all, _ = keys_HMD.shape
    parts, num_clusters = [], 0
    for begin in range(0, num_tokens, SEGMENT_TOKENS):
        segment_HTD = keys_HMD[:, begin : min(begin + SEGMENT_TOKENS, num_tokens)]
        count = max(1, segment_HTD.shape[1] // UNIT_TOKENS)
        parts.append(_cluster(segment_HTD, count) + num_clusters)
        num_clusters += count
    later_M = torch.arange(num_all - num_tokens, device=keys_HMD.device) // UNIT_TOKENS
    parts.append((later_M + num_clusters).expand(num_heads, -1))
    return torch.cat(parts, dim=1), num_clusters


def _cluster(keys_HTD: Tensor, count: int) -> Tensor:
    """k-means over directions of the centred keys, from evenly spaced starts: (H, T)."""
    centred_HTD = keys_HTD - keys_HTD.mean(1, keepdim=True)
    starts_C = torch.arange(count, device=keys_HTD.device) * keys_HTD.shape[1] // count
    centres_HCD = centred_HTD[:, starts_C]
    for _ in range(ROUNDS):
        unit_HCD = torch.nn.functional.normalize(centres_HCD, dim=-1)
        nearest_HT = (centred_HTD @ unit_HCD.transpose(1, 2)).argmax(-1)
        centres_HCD = _sum_units(centred_HTD, nearest_HT, count)
    return nearest_HT


def _sum_units(rows_HME: Tensor, units_HM: Tensor, num_units: int) -> Tensor:
    """Sums (H, U, E) of the rows of each unit."""
    sums_HUE = rows_HME.new_zeros((len(rows_HME), num_units, rows_HME.shape[-1]))
    return sums_HUE.scatter_add_(1, units_HM[..., None].expand_as(rows_HME), rows_HME)
