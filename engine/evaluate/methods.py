"""From a choice to what each layer attends to.

Shape legend: L layers, n positions, H KV heads, G query heads per KV head, D head dim, M tokens,
P pages, T tokens of a page, K selected pages, R kept dims, E = D + 1 (values, and their weight).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsed.core import BudgetRule, Choice, InputError, MetadataFormat, RankMethod
from sparsed.engine.evaluate.attend import Chosen, DenseMethod, LayerMethod
from sparsed.engine.evaluate.calibration import Calibration
from sparsed.engine.evaluate.clusters import ClusterMethod
from sparsed.engine.evaluate.estimates import PageEstimate
from sparsed.engine.evaluate.rankers import (
    CoarseToFineRanker,
    OracleRanker,
    RandomRanker,
    Ranker,
    SummaryRanker,
)
from sparsed.engine.evaluate.select import attended_pages, select_pages
from sparsed.engine.sparse.summaries import (
    CuboidMean,
    EveryKey,
    Extremes,
    Mean,
    MeanAndSpread,
    Rotated,
    Summary,
    Variance,
)

MIN_PAGES = 3


class PageMethod:
    """The pages that a ranker puts first; ``ranks`` times as many are listed, best first."""

    def __init__(
        self,
        ranker: Ranker,
        choice: Choice,
        *,
        counts_H: Tensor,
        estimate: PageEstimate | None,
        ranks: int,
    ) -> None:
        self.metadata_bytes = ranker.metadata_bytes
        if estimate is not None:
            self.metadata_bytes += estimate.metadata_bytes
        self._ranker = ranker
        self._choice = choice
        self._counts_H = counts_H
        self._estimate = estimate
        self._ranks = ranks

    def choose(self, q_nHGD: Tensor, weights_nHGM: Tensor, *, first: int) -> Chosen:
        page_size = self._choice.page_size
        positions_n = torch.arange(first, first + len(q_nHGD), device=q_nHGD.device)
        tail_n = positions_n // page_size
        mass_nHGP = None
        if isinstance(self._ranker, OracleRanker):
            mass_nHGP = torch.unflatten(weights_nHGM, -1, (-1, page_size)).sum(-1)
        scores_nHP = self._ranker.score(q_nHGD, mass_nHGP, num_full_n=tail_n)
        most = scores_nHP.shape[-1] - 1  # ranks beyond the full pages hold none
        listed_H = (self._counts_H * self._ranks).clamp(max=most)
        pages_nHK = select_pages(
            scores_nHP, num_full_n=tail_n, counts_H=listed_H, choice=self._choice
        )
        listed_K = torch.arange(pages_nHK.shape[-1], device=pages_nHK.device)
        read_nHK = pages_nHK.masked_fill(listed_K >= self._counts_H[:, None], -1)
        attended_nHP = attended_pages(read_nHK, num_pages=scores_nHP.shape[-1])
        attended_nHP.scatter_(-1, tail_n[:, None, None].expand(-1, scores_nHP.shape[1], 1), True)
        reads_nH = self._counts_H * page_size + (positions_n % page_size + 1)[:, None]
        chosen = Chosen(attended_nHP.repeat_interleave(page_size, -1), reads_nH.float(), pages_nHK)
        if self._estimate is None:
            return chosen
        return self._with_estimate(chosen, q_nHGD, weights_nHGM, scores_nHP, tail_n)

    def _with_estimate(
        self,
        chosen: Chosen,
        q_nHGD: Tensor,
        weights_nHGM: Tensor,
        scores_nHP: Tensor,
        tail_n: Tensor,
    ) -> Chosen:
        assert self._estimate is not None
        attended_nHP = chosen.attended_nHM[..., :: self._choice.page_size]
        pages_P = torch.arange(scores_nHP.shape[-1], device=tail_n.device)
        absent_nHP = attended_nHP | (pages_P >= tail_n[:, None])[:, None]
        estimated_nHP = self._estimate.next_best(scores_nHP.masked_fill(absent_nHP, float("-inf")))
        estimate_nHGE = self._estimate(q_nHGD, weights_nHGM, estimated_nHP)
        return chosen._replace(
            estimate_nHGE=estimate_nHGE,
            reads_nH=chosen.reads_nH + self._estimate.reads(estimated_nHP),
        )


class Methods:
    """One choice for a context of ``num_tokens`` of a model of ``num_layers``; ``ranks`` times the
    pages that are read are listed, for recordings.

    Every sparse layer reads ``MIN_PAGES`` full pages and those that are always read, whatever the
    share: what is measured as reads tells. Errors: InputError where the dense layers alone read more than it.
    """

    def __init__(
        self,
        choice: Choice,
        *,
        num_layers: int,
        num_tokens: int,
        scale: float,
        calibration: Calibration | None = None,
        ranks: int = 1,
    ) -> None:
        self.choice = choice
        self._num_tokens = num_tokens
        self._scale = scale
        self._calibration = calibration
        self._ranks = ranks
        self._share = _share_of_sparse_layers(choice, num_layers=num_layers)

    def open(self, layer: int, keys_HMD: Tensor, values_HMD: Tensor) -> LayerMethod:
        """The layer's method over its keys and values, float32, rows after the text zero."""
        choice = self.choice
        if self._share >= 1 or layer < choice.dense_layers:
            return DenseMethod()
        if choice.method is RankMethod.CLUSTERS:
            return ClusterMethod(
                keys_HMD,
                values_HMD,
                num_tokens=self._num_tokens,
                budget_tokens=self._share * self._num_tokens,
                estimated_tokens=choice.estimated * self._num_tokens,
                metadata=choice.metadata,
                scale=self._scale,
            )
        counts_H = self._counts(layer, keys_HMD)
        ranker = self._ranker(layer, keys_HMD, counts_H)
        estimate = None
        if choice.estimated:
            estimate = PageEstimate(
                keys_HMD,
                values_HMD,
                page_size=choice.page_size,
                num_pages=round(choice.estimated * self._num_tokens / choice.page_size),
                scale=self._scale,
            )
        return PageMethod(ranker, choice, counts_H=counts_H, estimate=estimate, ranks=self._ranks)

    def _counts(self, layer: int, keys_HMD: Tensor) -> Tensor:
        """Full pages that each KV head selects; the partial page comes on top. Those that are
        always read are among them, however many."""
        always = self.choice.sink_pages + self.choice.recent_pages
        page_size, most = self.choice.page_size, self._num_tokens // self.choice.page_size
        pages = self._share * self._num_tokens / page_size - 1
        factors_H = torch.ones(len(keys_HMD), device=keys_HMD.device)
        if self.choice.budgets is not BudgetRule.EQUAL:
            factors_H = self._calibrated().budget_factors(self.choice.budgets, layer)
        return (factors_H * pages).round().long().clamp(min(max(always, MIN_PAGES), most), most)

    def _ranker(self, layer: int, keys_HMD: Tensor, counts_H: Tensor) -> Ranker:
        choice = self.choice
        if choice.method is RankMethod.ORACLE:
            return OracleRanker(choice.group_rule, scale=self._scale)
        if choice.method is RankMethod.RANDOM:
            num_pages = keys_HMD.shape[1] // choice.page_size
            return RandomRanker(num_pages=num_pages, seed=layer, device=keys_HMD.device)
        summary, centre_HD = self._summary(layer), self._centre(layer)
        if not choice.super_pages:
            return SummaryRanker(
                keys_HMD,
                summary,
                choice,
                num_tokens=self._num_tokens,
                scale=self._scale,
                centre_HD=centre_HD,
            )
        most = float(counts_H.max()) * choice.coarse / choice.super_pages
        return CoarseToFineRanker(
            keys_HMD,
            summary,
            choice,
            num_tokens=self._num_tokens,
            scale=self._scale,
            num_runs=round(most) + 2,
            centre_HD=centre_HD,
        )

    def _centre(self, layer: int) -> Tensor | None:
        """What the engine subtracts too; None: of a summary in all dims, which learns nothing."""
        if self.choice.kept_dims is None:
            return None
        return self._calibrated().centre(layer)

    def _summary(self, layer: int) -> Summary:
        choice = self.choice
        if choice.method is RankMethod.GATE:
            return self._calibrated().gate(layer)
        summary = _plain_summary(choice, scale=self._scale)
        if choice.kept_dims is None:
            return summary
        keys_HDR, queries_HDR = self._calibrated().basis(layer, choice.kept_dims)
        # What the engine keeps in four bits, it multiplies with queries in eight.
        in_engine = choice.method is RankMethod.MEAN and choice.metadata is MetadataFormat.INT4
        return Rotated(
            summary, keys_HDR=keys_HDR, queries_HDR=queries_HDR, rounds_queries=in_engine
        )

    def _calibrated(self) -> Calibration:
        if self._calibration is None:
            raise InputError(
                f"{self.choice} needs a calibration of this model: make one first",
                field="calibration",
            )
        return self._calibration


def _plain_summary(choice: Choice, *, scale: float) -> Summary:
    match choice.method:
        case RankMethod.QUEST:
            return Extremes()
        case RankMethod.MEAN:
            return Mean()
        case RankMethod.MEAN_SPREAD:
            return MeanAndSpread()
        case RankMethod.VARIANCE:
            return Variance(choice.variance_weight, scale=scale)
        case RankMethod.EVERY_KEY:
            return EveryKey(scale=scale)
    assert choice.method is RankMethod.CUBOID_MEAN
    return CuboidMean()


def _share_of_sparse_layers(choice: Choice, *, num_layers: int) -> float:
    """What the others may read, so that the mean over all layers is the choice's share."""
    if choice.method is RankMethod.DENSE:
        return 1.0
    sparse_layers = num_layers - choice.dense_layers
    share = (choice.share * num_layers - choice.dense_layers) / max(1, sparse_layers)
    if share <= 0:
        raise InputError(
            f"{choice.dense_layers} dense layers of {num_layers} alone read more than a share of "
            f"{choice.share:.4g}: take fewer or a larger share",
            field="dense_layers",
        )
    return share
