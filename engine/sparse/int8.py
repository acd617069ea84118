"""Summaries in 8 bits: whole steps of a scale that every page has of its own.

No ranking of an engine keeps them so: this is for ``kernels.score`` and for the benchmark of
scoring in two passes, the measured alternative of ADR 9.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sparsed.kernels.levels import to_levels

MOST_STEPS: Final = 127


def to_int8(summaries_RXE: Tensor) -> tuple[Tensor, Tensor]:
    """Steps (R, X, E) int8 and their scales (R, X) float16, as ``kernels.score.score_pages`` takes
    them. steps * scale is off by at most half a scale a value, a score by half a scale times the
    sum of the query's values without their signs; ``kernels.levels.to_levels`` tells the exception.
    """
    steps_RXE, scales_RX1 = to_levels(summaries_RXE, MOST_STEPS)
    return steps_RXE.to(torch.int8), scales_RX1[..., 0].half()
