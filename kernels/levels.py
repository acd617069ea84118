"""Numbers in few bits: whole steps of a scale that every row has of its own.

Shape legend: leading dims as the caller has them (...), E values of a row.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

MIN_SCALE: Final = 2.0**-24  # of float16
WHOLE: Final = 1.5 * 2**23  # added to a float32 and taken away, it leaves a whole number


def to_levels(values_E: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Steps from -``most`` to ``most`` and their scales, both float32; steps * scale is off by at
    most half a scale, and the largest values by ``most`` times what float16 takes from it besides.

    A scale is what float16 keeps of the largest value of a row over ``most``, never 0.
    Shapes: values (..., E) in floating point; returns (..., E) and (..., 1).
    """
    values = values_E.float()
    scales = as_kept(values.abs().amax(-1, keepdim=True) / most)
    return (values / scales).round_().clamp_(-most, most), scales


def as_kept(scales: Tensor) -> Tensor:
    """Scales as float16 keeps them, in float32, never 0."""
    return scales.half().float().clamp_(min=MIN_SCALE)
