"""Many decode steps of one known text at once: what the engine computes token by token.

A decode step at position t sees the keys of earlier positions alone, and a layer's keys come from
the layer below. So all positions of a text can go through a layer together, each with a page
selection of its own, and give what one decode step after the other would give.

Shape legend: L layers, N positions, n positions of a block, H KV heads, G query heads per KV head,
D head dim, M tokens, P pages, T tokens of a page, F frames, C = 2 (key, value).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.sparse.base import Selector, select_pages
from sparsed.engine.sparse.bounds import make_selector
from sparsed.kernels.dense import attend_dense

ORACLE = "oracle"  # pages ranked by their true softmax mass, summed over the group
RANDOM = "random"
BLOCK_POSITIONS = 32  # the weights of a block stay in the processor's cache
LOGITS_POSITIONS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which tokens decode attends to. ``method`` is one of SparseMethod, "oracle" or "random"."""

    method: str
    token_budget: int
    page_size: int = 32
    dense_layers: int = 0
    seed: int = 0  # of "random"

    @property
    def num_selected(self) -> int:
        """Full pages of a selection; the partial page comes on top."""
        return self.token_budget // self.page_size - 1


class Scores(NamedTuple):
    """``logprobs_N`` of the tokens that follow each position; ``recall_LNH``: share of dense
    softmax mass on the attended tokens, per sparse layer, position and query head; empty if no
    layer is sparse."""

    logprobs_N: Tensor
    recall_LNH: Tensor


class Context:
    """K and V of a text, (L, H, M, 2, D) float32 on the CPU: dense and exact up to
    ``num_tokens``, then room for positions that are evaluated."""

    def __init__(self, decoder: Decoder, tokens: Sequence[int], *, num_scored: int) -> None:
        shape = decoder.config.shape
        self.num_tokens = len(tokens)
        num_frames = -(-(len(tokens) + num_scored) // BLOCK_TOKENS)
        size = (shape.num_layers, shape.num_kv_heads, num_frames * BLOCK_TOKENS, 2, shape.head_dim)
        self.kv_LHMCD = torch.zeros(size)
        self._scale = shape.head_dim**-0.5
        positions = torch.arange(len(tokens))
        lengths = torch.full_like(positions, len(tokens))
        decoder.forward(torch.tensor(tokens), positions, self._attend, lengths_N=lengths)

    def store(self, layer: int, k_NHD: Tensor, v_NHD: Tensor, *, first: int) -> Tensor:
        """Write positions ``first`` and on; returns the layer's keys and values (H, M, 2, D)."""
        kv_HMCD = self.kv_LHMCD[layer]
        kv_HMCD[:, first : first + len(k_NHD), 0] = k_NHD.transpose(0, 1)
        kv_HMCD[:, first : first + len(v_NHD), 1] = v_NHD.transpose(0, 1)
        return kv_HMCD

    def _attend(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        num_tokens, num_heads, head_dim = k_NHD.shape
        kv_HMCD = self.store(layer, k_NHD, v_NHD, first=0)[:, :num_tokens]
        q_HGND = q_NHD.view(num_tokens, num_heads, -1, head_dim).permute(1, 2, 0, 3)
        o_HGND, _ = attend_dense(
            q_HGND, kv_HMCD[:, :, 0], kv_HMCD[:, :, 1], causal=True, scale=self._scale
        )
        return o_HGND.permute(2, 0, 1, 3).reshape(q_NHD.shape)


class Ranker(Protocol):
    """Scores the pages of one layer at a time."""

    def open_layer(self, kv_HMCD: Tensor) -> None: ...

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor) -> Tensor:
        """Scores (n, H, P or more), larger is better. ``mass`` is the true softmax mass of each
        page; pages that are not full at a position score anything."""
        ...


class SelectorRanker:
    """The engine's own selectors, over summaries of every page."""

    def __init__(self, selector: Selector, *, page_size: int) -> None:
        self._selector = selector
        self._page_size = page_size

    def open_layer(self, kv_HMCD: Tensor) -> None:
        num_heads, num_tokens, _, head_dim = kv_HMCD.shape
        pages_MTCD = kv_HMCD.reshape(-1, self._page_size, 2, head_dim)
        summaries = self._selector.summarise(pages_MTCD)
        self._rows_HF = torch.arange(num_heads * num_tokens // BLOCK_TOKENS).view(num_heads, -1)
        self._summaries_RPE = summaries.view(self._rows_HF.numel(), -1, summaries.shape[-1])

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor) -> Tensor:
        rows_nHF = self._rows_HF.expand(len(q_nHGD), -1, -1).contiguous()
        return self._selector.score(q_nHGD, self._summaries_RPE, rows_BHF=rows_nHF)


class OracleRanker:
    """The true mass of a page, summed over the query heads of a KV head."""

    def open_layer(self, kv_HMCD: Tensor) -> None:
        pass

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor) -> Tensor:
        return mass_nHGP.sum(2)


class RandomRanker:
    """Any page, anew for every position and KV head."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def open_layer(self, kv_HMCD: Tensor) -> None:
        pass

    def score(self, q_nHGD: Tensor, mass_nHGP: Tensor) -> Tensor:
        num_positions, num_heads, _, num_pages = mass_nHGP.shape
        return torch.rand((num_positions, num_heads, num_pages), generator=self._generator)


class ParallelDecode:
    """The attention of all positions after ``context``; give it to the decoder."""

    def __init__(self, context: Context, choice: Choice) -> None:
        self._context = context
        self._choice = choice
        self._ranker = _make_ranker(choice)
        self.recalls: list[Tensor] = []  # (N, query heads) of each sparse layer

    def __call__(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        first = self._context.num_tokens
        kv_HMCD = self._context.store(layer, k_NHD, v_NHD, first=first)
        q_NHGD = q_NHD.reshape(len(q_NHD), len(kv_HMCD), -1, q_NHD.shape[-1])
        ranker = self._ranker if layer >= self._choice.dense_layers else None
        if ranker is not None:
            ranker.open_layer(kv_HMCD)
        outputs, recalls = [], []
        for begin, q_nHGD in _blocks(q_NHGD, BLOCK_POSITIONS):
            o_nHGD, recall_nHG = self._attend(q_nHGD, kv_HMCD, first=first + begin, ranker=ranker)
            outputs.append(o_nHGD.flatten(1, 2))
            recalls.append(recall_nHG.flatten(1))
        if ranker is not None:
            self.recalls.append(torch.cat(recalls))
        return torch.cat(outputs)

    def _attend(
        self, q_nHGD: Tensor, kv_HMCD: Tensor, *, first: int, ranker: Ranker | None
    ) -> tuple[Tensor, Tensor]:
        """Output (n, H, G, D) and recall (n, H, G) of positions ``first`` and on."""
        page_size = self._choice.page_size
        num_pages = (first + len(q_nHGD) - 1) // page_size + 1
        kv_HMCD = kv_HMCD[:, : num_pages * page_size]
        weights_HnGM = self._weights(q_nHGD, kv_HMCD, first=first)
        weights_HnGPT = weights_HnGM.view(*weights_HnGM.shape[:3], num_pages, page_size)
        recall_HnG = torch.ones(weights_HnGM.shape[:3])
        if ranker is not None:
            mass_HnGP = weights_HnGPT.sum(-1)
            scores_nHP = ranker.score(q_nHGD, mass_HnGP.transpose(0, 1))
            attended_HnP = self._attended(scores_nHP, first, num_pages).transpose(0, 1)
            recall_HnG = (mass_HnGP * attended_HnP[:, :, None]).sum(-1)
            weights_HnGPT *= attended_HnP[:, :, None, :, None]
        o_HnGD = (weights_HnGM.flatten(1, 2) @ kv_HMCD[:, :, 1]).view_as(q_nHGD.transpose(0, 1))
        return (o_HnGD / recall_HnG[..., None]).transpose(0, 1), recall_HnG.transpose(0, 1)

    def _weights(self, q_nHGD: Tensor, kv_HMCD: Tensor, *, first: int) -> Tensor:
        """Dense softmax weights (H, n, G, M), 0 for tokens after the position."""
        num_positions, num_heads, group, head_dim = q_nHGD.shape
        q_HRD = (q_nHGD * head_dim**-0.5).transpose(0, 1).reshape(num_heads, -1, head_dim)
        logits_HRM = q_HRD @ kv_HMCD[:, :, 0].transpose(1, 2)
        logits_HnGM = logits_HRM.view(num_heads, num_positions, group, -1)
        tokens_M = torch.arange(first, kv_HMCD.shape[1])
        future_nM = tokens_M > torch.arange(first, first + num_positions)[:, None]
        logits_HnGM[..., first:].masked_fill_(future_nM[:, None], float("-inf"))
        return torch.softmax(logits_HnGM, dim=-1)

    def _attended(self, scores_nHP: Tensor, first: int, num_pages: int) -> Tensor:
        """1 for selected pages and the page of the position itself, else 0: (n, H, P)."""
        num_positions, num_heads, _ = scores_nHP.shape
        tail_n = torch.arange(first, first + num_positions) // self._choice.page_size
        pages_nHK = select_pages(scores_nHP, num_full_B=tail_n, count=self._choice.num_selected)
        attended_nHP = torch.zeros((num_positions, num_heads, num_pages))
        attended_nHP.scatter_(-1, pages_nHK, 1.0)
        return attended_nHP.scatter_(-1, tail_n[:, None, None].expand(-1, num_heads, 1), 1.0)


def score_text(
    decoder: Decoder, context: Context, tokens: Sequence[int], *, choice: Choice
) -> Scores:
    """Feed ``tokens``, which follow the context, but for the last, which is only predicted."""
    positions_N = torch.arange(len(tokens) - 1) + context.num_tokens
    attend = ParallelDecode(context, choice)
    hidden_ND = decoder.forward(torch.tensor(tokens[:-1]), positions_N, attend)
    targets_N = torch.tensor(tokens[1:])
    logprobs = [
        token_logprobs(decoder.logits(hidden_ND[i : i + LOGITS_POSITIONS]), targets_n)
        for i, targets_n in _blocks(targets_N, LOGITS_POSITIONS)
    ]
    recalls = torch.stack(attend.recalls) if attend.recalls else torch.ones(0)
    return Scores(torch.cat(logprobs), recalls)


def token_logprobs(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Log-probability (n) of one token per row."""
    return logits_nV.log_softmax(-1).gather(-1, targets_n[:, None])[:, 0]


def _blocks(tensor_N: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Pieces of at most ``size`` with the index of their first row."""
    for begin in range(0, len(tensor_N), size):
        yield begin, tensor_N[begin : begin + size]


def _make_ranker(choice: Choice) -> Ranker | None:
    if choice.method == ORACLE:
        return OracleRanker()
    if choice.method == RANDOM:
        return RandomRanker(choice.seed)
    selector = make_selector(choice.method)
    return SelectorRanker(selector, page_size=choice.page_size) if selector else None
