"""Summaries in few bits, as what they would be after a round trip.

Shape legend: H KV heads, U units, E values kept of a unit.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sparsed.core import MetadataFormat

SCALE_BYTES: Final = 2
FP8_MAX: Final = 448.0  # of e4m3
LEVELS: Final = {MetadataFormat.INT8: 127, MetadataFormat.INT4: 7}
VALUE_BYTES: Final = {
    MetadataFormat.BF16: 2.0,
    MetadataFormat.FP8: 1.0,
    MetadataFormat.INT8: 1.0,
    MetadataFormat.INT4: 0.5,
}


def round_trip(summary_HUE: Tensor, kind: MetadataFormat) -> Tensor:
    """The summary as it is read back, float32; each unit has a scale of its own."""
    if kind is MetadataFormat.BF16:
        return summary_HUE.bfloat16().float()
    largest_HU1 = summary_HUE.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    if kind is MetadataFormat.FP8:
        scale_HU1 = (largest_HU1 / FP8_MAX).half().float().clamp(min=2**-24)
        values_HUE = (summary_HUE / scale_HU1).clamp(-FP8_MAX, FP8_MAX)
        return values_HUE.to(torch.float8_e4m3fn).float() * scale_HU1
    levels = LEVELS[kind]
    scale_HU1 = (largest_HU1 / levels).half().float().clamp(min=2**-24)
    return (summary_HUE / scale_HU1).round().clamp(-levels, levels) * scale_HU1


def unit_bytes(num_values: int, kind: MetadataFormat) -> float:
    """Bytes of a unit's summary of ``num_values`` values."""
    scale_bytes = 0 if kind is MetadataFormat.BF16 else SCALE_BYTES
    return num_values * VALUE_BYTES[kind] + scale_bytes
