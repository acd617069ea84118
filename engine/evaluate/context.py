"""The keys and values of a text: its beginning prefilled densely, the rest filled in as it is
evaluated.

Shape legend: L layers, N tokens, H KV heads, G query heads per KV head, D head dim, M tokens that
fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.engine.models.decoder import Decoder
from sparsed.kernels.dense import attend_dense


class Context:
    """``keys_LHMD`` and ``values_LHMD`` in the model's dtype on its device: exact up to
    ``num_tokens``, then room for ``num_scored`` positions, and zeros to the end of a block."""

    def __init__(self, decoder: Decoder, tokens: Sequence[int], *, num_scored: int) -> None:
        shape = decoder.config.shape
        embedding = decoder.weights.embedding_VD
        num_blocks = -(-(len(tokens) + num_scored) // BLOCK_TOKENS)
        size = (shape.num_layers, shape.num_kv_heads, num_blocks * BLOCK_TOKENS, shape.head_dim)
        self.num_tokens = len(tokens)
        self.keys_LHMD, self.values_LHMD = (embedding.new_zeros(size) for _ in range(2))
        self.scale = shape.head_dim**-0.5
        device = embedding.device
        positions_N = torch.arange(len(tokens), device=device)
        lengths_N = torch.full_like(positions_N, len(tokens))
        tokens_N = torch.tensor(tokens, device=device)
        decoder.forward(tokens_N, positions_N, self._attend, lengths_N=lengths_N)

    def store(self, layer: int, k_NHD: Tensor, v_NHD: Tensor, *, first: int) -> None:
        """Write positions ``first`` and on of a layer."""
        end = first + len(k_NHD)
        self.keys_LHMD[layer, :, first:end] = k_NHD.transpose(0, 1)
        self.values_LHMD[layer, :, first:end] = v_NHD.transpose(0, 1)

    def _attend(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        self.store(layer, k_NHD, v_NHD, first=0)
        num_tokens, num_heads, head_dim = k_NHD.shape
        q_HGND = q_NHD.view(num_tokens, num_heads, -1, head_dim).permute(1, 2, 0, 3)
        keys_HMD, values_HMD = (
            x[layer, :, :num_tokens] for x in (self.keys_LHMD, self.values_LHMD)
        )
        o_HGND, _ = attend_dense(q_HGND, keys_HMD, values_HMD, causal=True, scale=self.scale)
        return o_HGND.permute(2, 0, 1, 3).reshape(q_NHD.shape)
