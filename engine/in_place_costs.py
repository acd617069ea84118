"""Measures at a start what ``in_place`` decides by: how long recorded steps of nobody take."""

from __future__ import annotations

from typing import Final

import torch

from sparsed.core import SparseMethod
from sparsed.engine.in_place import InPlaceRule, Overhead
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.measure.ceilings import copy_bytes_per_s
from sparsed.engine.measure.clock import Clock
from sparsed.engine.step_decoder import StepDecoder

MANY_PAGES: Final = 4096  # a request of 32k in pages of 8; time grows evenly beyond
FEW_OF_MANY: Final = 16


def measure_rule(
    steps: StepDecoder, geometry: Geometry, *, method: str, max_pages: int, device: torch.device
) -> InPlaceRule | None:
    """None where nothing selects, or there are no graphs. Waits for the device."""
    if steps.tiered is None:
        return None
    clock, overheads = Clock(device), dict[int, Overhead]()
    many = min(MANY_PAGES, max_pages - 1)
    few = max(1, many // FEW_OF_MANY)
    for size in steps.sizes:
        seconds = []
        for pages in (0, few, many):
            graph = steps.rehearse(size, num_full=pages)
            if graph is None:
                return None
            seconds.append(clock.median_s(graph.replay))
        in_place_s, few_s, many_s = seconds
        overheads[size] = Overhead(few, few_s - in_place_s, many, many_s - in_place_s)
    kv_bytes = geometry.frame_bytes / (geometry.pages_per_block * geometry.page_size)
    return InPlaceRule(
        overheads,
        token_bytes=round(kv_bytes),
        summary_bytes=geometry.summary_bytes_per_frame(SparseMethod(method))
        / geometry.pages_per_block,
        page_size=geometry.page_size,
        bytes_per_s=copy_bytes_per_s(clock),
    )
