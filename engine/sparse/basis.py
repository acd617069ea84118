"""Bases of a model's keys, in whose first dims the products of queries and keys are largest.

Rotary embedding turns queries and keys with their position: a basis of a text is one of its
positions. So the moments of a short text are averaged over moves to all positions that are served.

Shape legend: L layers, H KV heads, G query heads per KV head, D head dim, R kept dims, N positions,
M tokens, C queries (N * G), J moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sparsed.core import InputError
from sparsed.engine.models.decoder import Decoder
from sparsed.kernels.dense import attend_dense

RIDGE: Final = 1e-4  # of the mean variance, so that rare directions can be divided by
NUM_MOVES: Final = 64
GOLDEN_RATIO: Final = 0.618034  # its multiples, less whole parts, fill a range evenly

Progress = Callable[[float], None]


class Basis(NamedTuple):
    """Of every layer and KV head, float32: maps of keys and of queries to the kept dims, in which
    their products are nearly those of queries and keys less ``centre_LHD``, the mean key."""

    keys_LHDR: Tensor
    queries_LHDR: Tensor
    centre_LHD: Tensor


class LayerBasis(NamedTuple):
    """As ``Basis``, of one layer and with all dims."""

    keys_HDD: Tensor
    queries_HDD: Tensor
    centre_HD: Tensor


class Moments(NamedTuple):
    """Means of the outer products of queries and of keys, and the mean key; float64."""

    queries_HDD: Tensor
    keys_HDD: Tensor
    centre_HD: Tensor

    @classmethod
    def of(cls, q_NHGD: Tensor, keys_HMD: Tensor) -> Moments:
        q_HCD, keys = q_NHGD.permute(1, 0, 2, 3).flatten(1, 2).double(), keys_HMD.double()
        return cls(q_HCD.mT @ q_HCD / q_HCD.shape[1], keys.mT @ keys / keys.shape[1], keys.mean(1))

    def spread(self, moves_JDD: Tensor) -> Moments:
        """The mean of these after each move."""
        queries, keys = (
            (moves_JDD @ part[:, None] @ moves_JDD.mT).mean(1)
            for part in (self.queries_HDD, self.keys_HDD)
        )
        return Moments(queries, keys, self.centre_HD @ moves_JDD.mean(0).T)


def product_basis(moments: Moments) -> LayerBasis:
    """Maps of keys and of queries to dims whose products add up to q.k, those that differ most
    from key to key first: the best low rank approximation of the products of queries and centred
    keys with these moments."""
    centre_HD1 = moments.centre_HD[..., None]
    q_root, q_inverse = _roots(moments.queries_HDD)
    k_root, k_inverse = _roots(moments.keys_HDD - centre_HD1 @ centre_HD1.mT)
    left, sizes, right = torch.linalg.svd(q_root @ k_root)
    weights_HD = sizes.sqrt()[:, None]
    return LayerBasis(
        (k_inverse @ right.mT * weights_HD).float(),
        (q_inverse @ left * weights_HD).float(),
        moments.centre_HD.float(),
    )


@torch.no_grad()
def learn_basis(
    decoder: Decoder,
    tokens: Sequence[int],
    *,
    max_tokens: int,
    num_dims: int,
    on_progress: Progress,
) -> Basis:
    """The basis of a model for sequences up to ``max_tokens``, from one text, prefilled densely:
    all its queries and keys count, at all positions.

    Errors: InputError if a key is not a number: pages cannot be ranked by such keys.
    """
    layers: list[LayerBasis] = []
    num_layers, scale = decoder.config.shape.num_layers, decoder.config.head_dim**-0.5
    positions_N = torch.arange(len(tokens), device=decoder.weights.embedding_VD.device)
    steps_J = torch.arange(NUM_MOVES, device=positions_N.device) * GOLDEN_RATIO % 1
    moves_JDD = decoder.rope.moves((steps_J * max(0, max_tokens - len(tokens))).round())

    def attend(layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        if not bool(k_NHD.isfinite().all()):
            raise InputError(
                f"the keys of layer {layer} are not all numbers, so that pages cannot be ranked; "
                "check the weights, take a wider dtype or start with --sparse-method dense",
                field="model",
            )
        q_NHGD = torch.unflatten(q_NHD, 1, (k_NHD.shape[1], -1))
        keys_HND, values_HND = k_NHD.transpose(0, 1), v_NHD.transpose(0, 1)
        layers.append(product_basis(Moments.of(q_NHGD, keys_HND).spread(moves_JDD)))
        on_progress(len(layers) / num_layers)
        o_HGND, _ = attend_dense(
            q_NHGD.permute(1, 2, 0, 3), keys_HND, values_HND, causal=True, scale=scale
        )
        return o_HGND.permute(2, 0, 1, 3).reshape(q_NHD.shape)

    tokens_N = torch.tensor(tokens, device=positions_N.device)
    lengths_N = torch.full_like(positions_N, len(tokens))
    decoder.forward(tokens_N, positions_N, attend, lengths_N=lengths_N)
    # Copies: what a forward pass makes is for inference mode alone.
    return Basis(
        torch.stack([layer.keys_HDD[..., :num_dims] for layer in layers]).clone(),
        torch.stack([layer.queries_HDD[..., :num_dims] for layer in layers]).clone(),
        torch.stack([layer.centre_HD for layer in layers]).clone(),
    )


def _roots(moments_HDC: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a symmetric matrix, and its inverse."""
    values_HD, vectors = torch.linalg.eigh(moments_HDC)
    values_HD = values_HD.clamp(min=0) + RIDGE * values_HD.mean(-1, keepdim=True)
    root_HD = values_HD.sqrt()[:, None]
    return (vectors * root_HD) @ vectors.mT, (vectors / root_HD) @ vectors.mT
