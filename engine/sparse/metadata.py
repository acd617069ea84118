"""Summaries in few bits, as what they would be after a round trip.

Shape legend: H KV heads, U units, E values kept of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from sparsed.core import MetadataFormat
from sparsed.kernels.levels import as_kept, to_levels

SCALE_BYTES: Final = 2
FP8_MAX: Final = 448.0  # of e4m3
UNSCALED: Final = (MetadataFormat.FP32, MetadataFormat.BF16)
LEVELS: Final = {MetadataFormat.INT8: 127, MetadataFormat.INT4: 7}
VALUE_BYTES: Final = {
    MetadataFormat.FP32: 4.0,
    MetadataFormat.BF16: 2.0,
    MetadataFormat.FP8: 1.0,
    MetadataFormat.INT8: 1.0,
    MetadataFormat.INT4: 0.5,
}


def round_trip(summary_HUE: Tensor, kind: MetadataFormat, *, signs: Sequence[bool]) -> Tensor:
    """The summary as it is read back, float32. Each of its equal parts has a scale a unit of its
    own; a part without a sign holds no negative values and has twice the levels for it."""
    if kind is MetadataFormat.FP32:
        return summary_HUE
    if kind is MetadataFormat.BF16:
        return summary_HUE.bfloat16().float()
    parts = summary_HUE.chunk(len(signs), dim=-1)
    read_back = [_read_back(part, kind, signed=s) for part, s in zip(parts, signs, strict=True)]
    return torch.cat(read_back, dim=-1)


def unit_bytes(num_values: int, kind: MetadataFormat, *, num_parts: int) -> float:
    """Bytes of a unit's summary of ``num_values`` values."""
    scale_bytes = 0 if kind in UNSCALED else SCALE_BYTES
    return num_values * VALUE_BYTES[kind] + scale_bytes * num_parts


def _read_back(part_HUE: Tensor, kind: MetadataFormat, *, signed: bool) -> Tensor:
    if kind is MetadataFormat.FP8:
        scale_HU1 = as_kept(part_HUE.abs().amax(-1, keepdim=True) / FP8_MAX)
        values_HUE = (part_HUE / scale_HU1).clamp(-FP8_MAX, FP8_MAX)
        return values_HUE.to(torch.float8_e4m3fn).float() * scale_HU1
    steps_HUE, scale_HU1 = to_levels(part_HUE, LEVELS[kind] if signed else 2 * LEVELS[kind] + 1)
    return steps_HUE * scale_HU1
