"""Many decode steps of one known text at once: what the engine computes token by token.

A decode step at position t sees the keys of earlier positions alone, and a layer's keys come from
the layer below. So all positions of a text can go through a layer together, each with a page
selection of its own, and give what one decode step after the other would give.

Shape legend: L layers, N positions, n positions of a block, H KV heads, G query heads per KV head,
D head dim, M tokens, P pages, T tokens of a page, K selected pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsed.engine.evaluate.attend import LayerAttention
from sparsed.engine.evaluate.context import Context
from sparsed.engine.evaluate.methods import Methods
from sparsed.engine.models.decoder import Decoder

CPU_POSITIONS = 32  # the weights of a block stay in the processor's cache
GPU_POSITIONS = 256
LOGITS_POSITIONS = 256


class LayerScores(NamedTuple):
    """Of one layer: ``recall_NHG``, the share of dense softmax mass on attended tokens;
    ``error_NHG``, the distance of the attention's output from the dense one over its length;
    ``reads_H``, attended (and estimated) tokens, the mean over positions; ``pages_NHK``, the
    selected full pages, best first and padded with -1; K is 0 where no pages were ranked."""

    recall_NHG: Tensor
    error_NHG: Tensor
    reads_H: Tensor
    pages_NHK: Tensor


class Scores(NamedTuple):
    """``logprobs_N`` of the tokens that follow each position, ``hits_N`` whether each was the
    likeliest, and what every layer did."""

    logprobs_N: Tensor
    hits_N: Tensor
    layers: list[LayerScores]
    metadata_bytes: float


class ParallelDecode:
    """The attention of all positions after ``context``; give it to the decoder."""

    def __init__(self, context: Context, methods: Methods) -> None:
        self._context = context
        self._methods = methods
        self.layers: list[LayerScores] = []
        self.metadata_bytes: list[float] = []

    def __call__(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        context = self._context
        first = context.num_tokens
        context.store(layer, k_NHD, v_NHD, first=first)
        keys_HMD, values_HMD = context.keys_LHMD[layer].float(), context.values_LHMD[layer].float()
        method = self._methods.open(layer, keys_HMD, values_HMD)
        self.metadata_bytes.append(method.metadata_bytes)
        q_NHGD = torch.unflatten(q_NHD.float(), 1, (len(keys_HMD), -1))
        size = GPU_POSITIONS if q_NHD.is_cuda else CPU_POSITIONS
        attention = LayerAttention(keys_HMD, values_HMD, method, scale=context.scale)
        parts = [attention(q_nHGD, first=first + i) for i, q_nHGD in blocks(q_NHGD, size)]
        outputs, recalls, errors, reads, pages = (torch.cat(x) for x in zip(*parts, strict=True))
        self.layers.append(LayerScores(recalls, errors, reads.mean(0), pages))
        return outputs.flatten(1, 2).to(q_NHD.dtype)


def score_text(
    decoder: Decoder, context: Context, tokens: Sequence[int], *, methods: Methods
) -> Scores:
    """Feed ``tokens``, which follow the context, but for the last, which is only predicted."""
    device = context.keys_LHMD.device
    fed_N, targets_N = torch.tensor([tokens[:-1], tokens[1:]], device=device)
    positions_N = torch.arange(len(fed_N), device=device) + context.num_tokens
    attend = ParallelDecode(context, methods)
    hidden_ND = decoder.forward(fed_N, positions_N, attend)
    logprobs, hits = [], []
    for i, targets_n in blocks(targets_N, LOGITS_POSITIONS):
        logits_nV = decoder.logits(hidden_ND[i : i + LOGITS_POSITIONS])
        logprobs.append(token_logprobs(logits_nV, targets_n))
        hits.append(logits_nV.argmax(-1) == targets_n)
    return Scores(torch.cat(logprobs), torch.cat(hits), attend.layers, sum(attend.metadata_bytes))


def token_logprobs(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Log-probability (n) of one token per row."""
    return logits_nV.log_softmax(-1).gather(-1, targets_n[:, None])[:, 0]


def blocks(tensor_N: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Pieces of at most ``size`` with the index of their first row."""
    for begin in range(0, len(tensor_N), size):
        yield begin, tensor_N[begin : begin + size]
