"""Rankings of the pages of one layer, for many positions at once.

Shape legend: n positions, H KV heads, G query heads per KV head, D head dim, M tokens, P pages,
U units (pages, or what they are cut into), T tokens of a unit, S runs of pages.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

from sparsed.core import Choice, GroupRule
from sparsed.engine.sparse.groups import agree
from sparsed.engine.sparse.metadata import round_trip, unit_bytes
from sparsed.engine.sparse.summaries import Summary

LEAST_MASS: Final = 1e-30


class Ranker(Protocol):
    """Scores the pages of a layer."""

    metadata_bytes: float  # of the layer, per token and KV head

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor | None, *, num_full_n: Tensor) -> Tensor:
        """Scores (n, H, P), larger is better; pages from ``num_full`` on may score anything.
        ``mass`` is the true softmax mass of each page, given to an ``OracleRanker`` alone."""
        ...


class OracleRanker:
    """The true mass of a page, agreed upon by a group."""

    metadata_bytes = 0.0

    def __init__(self, rule: GroupRule, *, scale: float) -> None:
        self._rule = rule
        self._scale = scale

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor | None, *, num_full_n: Tensor) -> Tensor:
        assert mass_nHGP is not None
        logs_nHGP = mass_nHGP.clamp(min=LEAST_MASS).log() / self._scale
        return agree(logs_nHGP, self._rule, scale=self._scale)


class RandomRanker:
    """Any page, anew for every position and KV head."""

    metadata_bytes = 0.0

    def __init__(self, *, num_pages: int, seed: int, device: torch.device) -> None:
        self._num_pages = num_pages
        self._generator = torch.Generator(device).manual_seed(seed)

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor | None, *, num_full_n: Tensor) -> Tensor:
        shape = (*q_nHGD.shape[:2], self._num_pages)
        return torch.rand(shape, generator=self._generator, device=q_nHGD.device)


class SummaryRanker:
    """Estimates from the summaries of units, agreed upon by a group, best unit for the page.

    Summaries are of keys less ``centre_HD``, or their mean over the text: that changes all
    estimates of a query alike, and so no ranking, but leaves few bits less to hold.
    """

    def __init__(
        self,
        keys_HMD: Tensor,
        summary: Summary,
        choice: Choice,
        *,
        num_tokens: int,
        scale: float,
        centre_HD: Tensor | None = None,
    ) -> None:
        self._summary = summary
        self._rule = choice.group_rule
        self._scale = scale
        unit_tokens = choice.grain or choice.page_size
        self._page_units = choice.page_size // unit_tokens
        if centre_HD is None:
            centre_HD = keys_HMD[:, :num_tokens].mean(1)
        centred_HMD = keys_HMD - centre_HD[:, None]
        units_HUTD = torch.unflatten(centred_HMD, 1, (-1, unit_tokens))
        self._units_HUE = self._keep(summary.build(units_HUTD), choice)
        self.metadata_bytes = self._unit_bytes(choice) / unit_tokens

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor | None, *, num_full_n: Tensor) -> Tensor:
        scores_nHU = self._score(q_nHGD, self._units_HUE, num_full_n * self._page_units)
        return torch.unflatten(scores_nHU, -1, (-1, self._page_units)).amax(-1)

    def _keep(self, summary_HUE: Tensor, choice: Choice) -> Tensor:
        return round_trip(summary_HUE, choice.metadata, signs=self._summary.signs)

    def _unit_bytes(self, choice: Choice) -> float:
        num_values = self._units_HUE.shape[-1]
        return unit_bytes(num_values, choice.metadata, num_parts=len(self._summary.signs))

    def _score(self, q_nHGD: Tensor, units_HUE: Tensor, num_full_n: Tensor) -> Tensor:
        estimates_nHGU = self._summary.estimate(q_nHGD, units_HUE)
        units_U = torch.arange(units_HUE.shape[1], device=q_nHGD.device)
        absent_nU = units_U >= num_full_n[:, None]
        estimates_nHGU.masked_fill_(absent_nU[:, None, None], float("-inf"))
        return agree(estimates_nHGU, self._rule, scale=self._scale)


class CoarseToFineRanker(SummaryRanker):
    """The same, but only inside the runs of neighbouring pages whose own summaries, merged from
    those of their units, rank best. The first and the last run are always among them."""

    def __init__(
        self,
        keys_HMD: Tensor,
        summary: Summary,
        choice: Choice,
        *,
        num_tokens: int,
        scale: float,
        num_runs: int,
        centre_HD: Tensor | None = None,
    ) -> None:
        super().__init__(
            keys_HMD, summary, choice, num_tokens=num_tokens, scale=scale, centre_HD=centre_HD
        )
        self._run_pages = choice.super_pages
        self._num_runs = num_runs
        run_units = choice.super_pages * self._page_units
        missing = -self._units_HUE.shape[1] % run_units
        padded_HUE = torch.nn.functional.pad(self._units_HUE, (0, 0, 0, missing))
        runs_HSE = summary.merge(torch.unflatten(padded_HUE, 1, (-1, run_units)))
        self._runs_HSE = self._keep(runs_HSE, choice)
        self.metadata_bytes += self._unit_bytes(choice) / (choice.super_pages * choice.page_size)

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor | None, *, num_full_n: Tensor) -> Tensor:
        scores_nHP = super().score(q_nHGD, mass_nHGP, num_full_n=num_full_n)
        num_full_runs_n = num_full_n // self._run_pages
        last_n = (num_full_n - 1).clamp(min=0) // self._run_pages
        scores_nHS = self._score(q_nHGD, self._runs_HSE, num_full_runs_n)
        scores_nHS[..., 0] = torch.inf
        scores_nHS.scatter_(-1, last_n[:, None, None].expand(-1, scores_nHS.shape[1], 1), torch.inf)
        best_nHR = scores_nHS.topk(min(self._num_runs, scores_nHS.shape[-1])).indices
        kept_nHS = torch.zeros_like(scores_nHS, dtype=torch.bool).scatter_(-1, best_nHR, True)
        kept_nHP = kept_nHS.repeat_interleave(self._run_pages, dim=-1)[..., : scores_nHP.shape[-1]]
        return scores_nHP.masked_fill(~kept_nHP, float("-inf"))
