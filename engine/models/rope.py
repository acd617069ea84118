"""Rotary position embedding: the frequencies of each variant, and the angles of every position.

Shape legend: N tokens, D head dim, F = D / 2 frequencies, J positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsed.engine.models.rope_config import RopeConfig


class Rope:
    """cos and sin of every position, computed once per forward and shared by all layers."""

    def __init__(self, config: RopeConfig, *, head_dim: int, device: torch.device) -> None:
        frequencies_F, self._scale = rope_frequencies(config, head_dim=head_dim)
        self._config = config
        self._head_dim = head_dim
        self._frequencies_F = frequencies_F.to(device)
        self._exponents_F = _exponents(head_dim).to(device)

    def tables(
        self, positions_N: Tensor, *, lengths_N: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos and signed sin, both (N, D), as ``kernels.rotate.rotate_heads`` takes them.

        ``lengths_N`` is read by the dynamic variant alone: see ``Decoder.forward``.
        """
        frequencies = self._frequencies_F
        if self._config.kind == "dynamic":
            lengths_N = positions_N + 1 if lengths_N is None else lengths_N
            frequencies = self._dynamic_frequencies(lengths_N)
        angles_NF = positions_N[:, None].float() * frequencies
        cos_NF, sin_NF = angles_NF.cos(), angles_NF.sin()
        if self._scale != 1.0:
            cos_NF, sin_NF = cos_NF * self._scale, sin_NF * self._scale
        cos_ND = torch.cat((cos_NF, cos_NF), dim=1)
        sin_ND = torch.cat((-sin_NF, sin_NF), dim=1)
        return cos_ND.to(dtype), sin_ND.to(dtype)

    def moves(self, positions_J: Tensor) -> Tensor:
        """Matrices (J, D, D), float64, that take rotated heads so many positions on: ``move @ x``
        (of the dynamic variant those of a sequence within the original context)."""
        angles_JF = positions_J.double()[:, None] * self._frequencies_F.double()
        cos_JF, sin_JF = angles_JF.cos(), angles_JF.sin()
        eye_DD = torch.eye(self._head_dim, dtype=torch.float64, device=positions_J.device)
        other_half_DD = eye_DD.roll(self._head_dim // 2, dims=1)
        sin_JD = torch.cat((-sin_JF, sin_JF), dim=1)
        return torch.diag_embed(cos_JF.repeat(1, 2)) + sin_JD[..., None] * other_half_DD

    def _dynamic_frequencies(self, lengths_N: Tensor) -> Tensor:
        """(N, F) of each token's own base, which grows with its sequence (NTK-aware scaling)."""
        config, dim = self._config, self._head_dim
        lengths_N = lengths_N.clamp(min=config.original_max_position).float()
        stretch_N = config.factor * lengths_N / config.original_max_position - (config.factor - 1)
        theta_N = config.theta * stretch_N ** (dim / (dim - 2))
        return 1.0 / theta_N[:, None] ** self._exponents_F


def rope_frequencies(config: RopeConfig, *, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position (F,) float32, and the factor on cos and sin.

    Of the dynamic variant: those of a sequence within the original context.
    Source: RoPE, arXiv 2104.09864; linear, arXiv 2306.15595; yarn, arXiv 2309.00071; llama3, the
    piecewise rule published with Llama 3.1.
    """
    frequencies_F = 1.0 / config.theta ** _exponents(head_dim)
    if config.kind == "linear":
        return frequencies_F / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(frequencies_F, config), 1.0
    if config.kind == "yarn":
        return _yarn(frequencies_F, config), _yarn_scale(config)
    return frequencies_F, 1.0


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _llama3(frequencies_F: Tensor, config: RopeConfig) -> Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    turns_F = config.original_max_position * frequencies_F / (2 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    kept_F = ((turns_F - config.low_freq_factor) / span).clamp(0, 1)
    return (1 - kept_F) * frequencies_F / config.factor + kept_F * frequencies_F


def _yarn(frequencies_F: Tensor, config: RopeConfig) -> Tensor:
    """Dimensions that turn often keep their frequency, the slow ones are interpolated."""
    num_frequencies = frequencies_F.numel()
    low, high = (
        _yarn_dimension(turns, config, head_dim=2 * num_frequencies)
        for turns in (config.beta_fast, config.beta_slow)
    )
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_frequencies - 1)
    width = (high - low) or 0.001  # a step where both ends meet
    slowed_F = ((torch.arange(num_frequencies, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies_F / config.factor * slowed_F + frequencies_F * (1 - slowed_F)


def _yarn_dimension(turns: float, config: RopeConfig, *, head_dim: int) -> float:
    """The dimension that makes ``turns`` full turns over the original context."""
    wavelength = config.original_max_position / (turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(config.theta))


def _yarn_scale(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _mscale(config, config.mscale) / _mscale(config, config.mscale_all_dim)
    return _mscale(config, 1.0)


def _mscale(config: RopeConfig, weight: float) -> float:
    return 0.1 * weight * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0
