"""Attention of many positions of a layer to what a method chooses, beside the dense one.

Shape legend: n positions, H KV heads, G query heads per KV head, D head dim, M tokens, K selected
pages, E = D + 1 (values, and their weight), X = D + PADDING, R = n * G.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

PADDING: Final = 8  # columns beside the values, of which one is used: rows stay aligned


class Chosen(NamedTuple):
    """What the positions of a block attend to. ``attended_nHM`` may be true for tokens after a
    position, which weigh nothing; ``reads_nH`` counts tokens read, estimated ones included;
    ``pages_nHK`` as ``select_pages`` gives them, K = 0 where no pages are ranked;
    ``estimate_nHGE`` is added to the sums of weighted values and of weights."""

    attended_nHM: Tensor
    reads_nH: Tensor
    pages_nHK: Tensor
    estimate_nHGE: Tensor | None = None


class LayerMethod(Protocol):
    """One layer, ready to choose. ``metadata_bytes``: per token and KV head."""

    metadata_bytes: float

    def choose(self, q_nHGD: Tensor, weights_nHGM: Tensor, *, first: int) -> Chosen | None:
        """What positions ``first`` and on attend to, by their queries and their dense softmax
        weights; None: everything."""
        ...


class DenseMethod:
    """Everything."""

    metadata_bytes = 0.0

    def choose(self, q_nHGD: Tensor, weights_nHGM: Tensor, *, first: int) -> Chosen | None:
        return None


class LayerAttention:
    """Attention of one layer as its method chooses, and what that misses of the dense one."""

    def __init__(
        self, keys_HMD: Tensor, values_HMD: Tensor, method: LayerMethod, *, scale: float
    ) -> None:
        sums_HMX = torch.zeros_like(values_HMD[..., :PADDING])
        sums_HMX[..., 0].fill_(1.0)
        self._keys_HDM = keys_HMD.transpose(1, 2) * scale
        self._values_HMX = torch.cat((values_HMD, sums_HMX), dim=-1)
        self._method = method

    def __call__(
        self, q_nHGD: Tensor, *, first: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Output (n, H, G, D), recall and error (n, H, G), reads (n, H), pages (n, H, K)."""
        weights_nHGM = self._weights(q_nHGD, first=first)
        dense_nHGD = self._mix(weights_nHGM)[..., :-1]
        choice = self._method.choose(q_nHGD, weights_nHGM, first=first)
        if choice is None:
            ones_nHG = torch.ones_like(dense_nHGD[..., 0])
            reads_nH = ones_nHG[..., 0] * self._lengths(q_nHGD, first)
            none_nHK = reads_nH[..., None][..., :0].long()
            return dense_nHGD, ones_nHG, torch.zeros_like(ones_nHG), reads_nH, none_nHK
        weights_nHGM *= choice.attended_nHM[:, :, None]
        mixed_nHGE = self._mix(weights_nHGM)
        recall_nHG = mixed_nHGE[..., -1]
        if choice.estimate_nHGE is not None:
            mixed_nHGE = mixed_nHGE + choice.estimate_nHGE
        o_nHGD = mixed_nHGE[..., :-1] / mixed_nHGE[..., -1:]
        error_nHG = (o_nHGD - dense_nHGD).norm(dim=-1) / dense_nHGD.norm(dim=-1)
        return o_nHGD, recall_nHG, error_nHG, choice.reads_nH, choice.pages_nHK

    def _lengths(self, q_nHGD: Tensor, first: int) -> Tensor:
        """Tokens that each position sees, (n, 1)."""
        return torch.arange(first + 1, first + 1 + len(q_nHGD), device=q_nHGD.device)[:, None]

    def _weights(self, q_nHGD: Tensor, *, first: int) -> Tensor:
        """Dense softmax weights (n, H, G, M), 0 for tokens after the position."""
        num_positions, _, group, _ = q_nHGD.shape
        logits_HRM = q_nHGD.transpose(0, 1).flatten(1, 2) @ self._keys_HDM
        logits_HnGM = torch.unflatten(logits_HRM, 1, (num_positions, group))
        tokens_M = torch.arange(first, logits_HRM.shape[-1], device=q_nHGD.device)
        positions_n = torch.arange(first, first + num_positions, device=q_nHGD.device)
        future_nM = tokens_M > positions_n[:, None]
        logits_HnGM[..., first:].masked_fill_(future_nM[:, None], float("-inf"))
        return torch.softmax(logits_HnGM, dim=-1).transpose(0, 1)

    def _mix(self, weights_nHGM: Tensor) -> Tensor:
        """Weighted values and, last, the sum of the weights: (n, H, G, E)."""
        num_positions, _, group, _ = weights_nHGM.shape
        mixed_HRX = weights_nHGM.transpose(0, 1).flatten(1, 2) @ self._values_HMX
        mixed_HRE = mixed_HRX[..., : 1 - PADDING]
        return torch.unflatten(mixed_HRE, 1, (num_positions, group)).transpose(0, 1)
