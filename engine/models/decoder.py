"""The decoder of all supported families: tokens in, hidden states and logits out.

Shape legend: N tokens of many requests, n tokens that need logits, H query heads, K KV heads,
D head dim (hidden states: their width), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsed.engine.models.config import ModelConfig
from sparsed.engine.models.rope import Rope
from sparsed.engine.models.weights import LayerWeights, ModelWeights
from sparsed.kernels.gate import silu_mul
from sparsed.kernels.norm import rms_norm
from sparsed.kernels.rotate import rotate_heads


class Attend(Protocol):
    """Attention of one layer, given by the caller; it also stores k and v.

    q (N, H, D), k and v (N, K, D); q and k are rotated, and normed where the family does so. All
    are views with heads and dims contiguous but rows further apart. Returns o (N, H, D) in q's
    dtype.
    """

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, /) -> Tensor: ...


class Foresee(Protocol):
    """Told, before a layer runs, how to make queries that foretell those of the next layer.

    ``make_query`` gives q (N, H, D), contiguous: the next layer's own maps, of the hidden states
    that go into this layer instead of those that come out of it. It may be called on another
    stream, and need not be called.
    """

    def __call__(self, layer: int, make_query: Callable[[], Tensor], /) -> None: ...


class Decoder:
    """Llama, Mistral, Qwen2 and Qwen3 differ in biases and in the norm of Q and K only.

    Holds no state between calls; the KV cache is behind ``attend``.
    """

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self.rope = Rope(config.rope, head_dim=config.head_dim, device=weights.embedding_VD.device)

    @torch.inference_mode()
    def forward(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        attend: Attend,
        *,
        lengths_N: Tensor | None = None,
        foresee: Foresee | None = None,
        queries_LNHD: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (N, D) before the last norm, of tokens in any mixture of requests.
        ``queries`` (L, N, H, D), if given, takes the queries of every layer, each contiguous, and
        ``attend`` gets them from there.

        ``lengths_N`` matters to dynamic RoPE alone, which rotates a token by the length its
        sequence has when the token is computed: the whole prompt for a prompt token (whatever the
        chunk), position + 1 for a generated one. None means position + 1 for all.
        """
        hidden_ND = F.embedding(tokens_N, self.weights.embedding_VD)
        tables = self.rope.tables(positions_N, lengths_N=lengths_N, dtype=hidden_ND.dtype)
        for number in range(len(self.weights.layers)):
            if foresee is not None and number + 1 < len(self.weights.layers):
                after = self.weights.layers[number + 1]
                normed_ND = self._norm(hidden_ND, after.input_norm_D)
                foresee(number + 1, partial(self._query, normed_ND, after, tables))
            q_NHD = None if queries_LNHD is None else queries_LNHD[number]
            self._run_layer(number, hidden_ND, attend, tables=tables, q_NHD=q_NHD)
        return hidden_ND

    @torch.inference_mode()
    def logits(self, hidden_nD: Tensor, *, out: Tensor | None = None) -> Tensor:
        """(n, V) float32, of rows of what ``forward`` returned; ``out`` takes them if given."""
        logits_nV = self.weights.head(self._norm(hidden_nD, self.weights.norm_D))
        return logits_nV.float() if out is None else out.copy_(logits_nV)

    def _run_layer(
        self,
        number: int,
        hidden_ND: Tensor,
        attend: Attend,
        *,
        tables: tuple[Tensor, Tensor],
        q_NHD: Tensor | None,
    ) -> None:
        """Add attention and MLP of a layer to the hidden states. Nothing on the way has a name, which
        would keep it while the next one is made: of a large chunk each is hundreds of MiB, and
        ``engine/workspace.py`` counts on it."""
        layer = self.weights.layers[number]
        layer.output.add_to(
            hidden_ND,
            attend(
                number,
                *self._project(
                    self._norm(hidden_ND, layer.input_norm_D), layer, tables, q_NHD=q_NHD
                ),
            ).flatten(1),
        )
        layer.down.add_to(
            hidden_ND, silu_mul(layer.gate_up(self._norm(hidden_ND, layer.post_norm_D)))
        )

    def _project(
        self,
        normed_ND: Tensor,
        layer: LayerWeights,
        tables: tuple[Tensor, Tensor],
        *,
        q_NHD: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (in ``q_NHD``, if there is one), k and v; q and k go through norm and rotation as one
        tensor."""
        config, eps = self.config, self.config.rms_norm_eps
        num_rotated = config.num_heads + config.num_kv_heads
        heads = layer.qkv(normed_ND).view(len(normed_ND), -1, config.head_dim)
        rotated, v_NKD = heads[:, :num_rotated], heads[:, num_rotated:]
        rotated = rotate_heads(rotated, *tables, norm_HD=layer.qk_norm_HD, eps=eps, first_NFD=q_NHD)
        q_NHD = rotated[:, : config.num_heads] if q_NHD is None else q_NHD
        return q_NHD, rotated[:, config.num_heads :], v_NKD

    def _query(
        self, normed_ND: Tensor, layer: LayerWeights, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        """q of ``_project`` alone."""
        num_heads, head_dim = self.config.num_heads, self.config.head_dim
        heads = layer.qkv.first_rows(normed_ND, num_heads * head_dim)
        norm_HD = None if layer.qk_norm_HD is None else layer.qk_norm_HD[:num_heads]
        heads = heads.view(len(normed_ND), num_heads, head_dim)
        return rotate_heads(heads, *tables, norm_HD=norm_HD, eps=self.config.rms_norm_eps)

    def _norm(self, x_ND: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x_ND, weight_D, eps=self.config.rms_norm_eps)
