"""Summaries in 8 bits: whole steps of a scale that every page has of its own."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MOST_STEPS: Final = 127
ROUND_UP: Final = 1 + 2**-10  # float16 rounds by less: no value needs more than MOST_STEPS


def to_int8(
    summaries_RXE: Tensor, *, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """Steps (R, X, E) int8 and their scales (R, X), as ``kernels.score.score_pages`` takes them.

    A scale is a 127th of the largest value of its page, rounded up, or the smallest normal number
    of ``scale_dtype`` (float16 or float32). steps * scale is off by at most half a scale a value,
    a score by half a scale times the sum of the query's values without their signs.
    """
    peaks_RX = summaries_RXE.abs().amax(dim=-1).float()
    smallest = torch.finfo(scale_dtype).tiny
    scales_RX = (peaks_RX * (ROUND_UP / MOST_STEPS)).clamp_(min=smallest).to(scale_dtype)
    steps_RXE = summaries_RXE / scales_RX.float()[..., None]
    return steps_RXE.round_().to(torch.int8), scales_RX
