"""Temporal locality of page selections: what a step takes over from the steps before it, and how
often an exact LRU of a given size would have to fetch. Each miss crosses the link.

Shape legend: S steps, H KV heads, K selected pages, L lanes, P pages, M residencies, C counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsed.core import RESIDENCIES, WARMUP_STEPS, WINDOW_STEPS, WORST_FRAC, Locality

WORST_RESIDENCY: Final = 4.0

Counts = npt.NDArray[np.int64]


class Column(IntEnum):
    """What is counted of a step, in pages of all lanes; misses at each of RESIDENCIES follow."""

    SELECTED = 0
    REPEATED = 1
    WINDOW = 2
    FIRST_TOUCH = 3
    MISSES = 4


_NUM_COLUMNS: Final = Column.MISSES + len(RESIDENCIES)


class LocalityMeter:
    """Pools layers and texts. All layers of a text have the same steps: a step's misses are those
    of all its lanes. One thread."""

    def __init__(self) -> None:
        self._counts_SC: dict[int, Counts] = {}

    def add(self, pages_SHK: Tensor | npt.NDArray[Any], *, text: int = 0) -> None:
        """Count the selections of one layer, or of several side by side in H, over the steps of
        ``text``, a number of the caller's own. Shape, values and device as in ``count_steps``.

        Errors: ValueError if another layer of the text had another number of steps.
        """
        counts_SC = count_steps(torch.as_tensor(pages_SHK)).cpu().numpy()
        known_SC = self._counts_SC.get(text)
        if known_SC is None:
            self._counts_SC[text] = counts_SC
        elif len(known_SC) == len(counts_SC):
            self._counts_SC[text] = known_SC + counts_SC
        else:
            raise ValueError(f"{len(counts_SC)} steps, but {len(known_SC)} in text {text} so far")

    def result(self) -> Locality | None:
        """Of all that was added; None if nothing was selected after the warm-up of any text."""
        warm = [counts_SC[WARMUP_STEPS:] for counts_SC in self._counts_SC.values()]
        counts_SC = np.concatenate(warm or [np.zeros((0, _NUM_COLUMNS), dtype=np.int64)])
        counts_SC = counts_SC[counts_SC[:, Column.SELECTED] > 0]
        if not len(counts_SC):
            return None
        share_C = counts_SC.sum(0) / counts_SC[:, Column.SELECTED].sum()
        worst = counts_SC[:, Column.MISSES + RESIDENCIES.index(WORST_RESIDENCY)]
        worst_S = worst / counts_SC[:, Column.SELECTED]
        return Locality(
            num_steps=len(counts_SC),
            overlap_frac=float(share_C[Column.REPEATED]),
            window_ratio=float(share_C[Column.WINDOW]),
            first_touch_frac=float(share_C[Column.FIRST_TOUCH]),
            miss_fracs=tuple(share_C[Column.MISSES :].tolist()),
            worst_miss_frac=float(np.quantile(worst_S, 1 - WORST_FRAC)),
        )


def count_steps(pages_SLK: Tensor) -> Tensor:
    """Pages counted in each step, (S, C) int64 on the device of ``pages``: the columns of
    ``Column``, summed over lanes.

    ``pages`` (S, L, K) of any integer type holds the ids of the full pages that each lane selects,
    in any order; negative ids are padding. A lane's LRU holds ``floor(residency * K)`` pages, K
    being the lane's largest selection. All pages of a step are touched at once: hits are pages
    among the most recently used ones before the step, and of pages last used in the same step the
    one with the higher id is the more recent. Nothing waits for the device between the steps.
    """
    num_steps, num_lanes, _ = pages_SLK.shape
    device = pages_SLK.device
    counts_SC = torch.zeros((num_steps, _NUM_COLUMNS), dtype=torch.int64, device=device)
    if not pages_SLK.numel():
        return counts_SC
    num_pages = max(int(pages_SLK.max()), 0) + 1
    largest_L = (pages_SLK >= 0).sum(-1).amax(0)
    residency_M = torch.tensor(RESIDENCIES, dtype=torch.float64, device=device)
    capacity_LM = (largest_L[:, None] * residency_M).long()  # truncates: the floor
    recency = Recency(num_lanes, num_pages, device=device)
    last_use_LP = torch.full((num_lanes, num_pages), -WINDOW_STEPS, device=device)
    for step, selected_LP in enumerate(_masks(pages_SLK, num_pages)):
        count_L = selected_LP.sum(-1)
        counts_SC[step, Column.SELECTED] = count_L.sum()
        counts_SC[step, Column.REPEATED] = (selected_LP & (last_use_LP == step - 1)).sum()
        last_use_LP.masked_fill_(selected_LP, step)
        counts_SC[step, Column.WINDOW] = (last_use_LP > step - WINDOW_STEPS).sum()
        seen_L1, hits_LM = recency.touch(selected_LP, capacity_LM=capacity_LM)
        counts_SC[step, Column.FIRST_TOUCH] = (count_L - seen_L1[:, 0]).sum()
        counts_SC[step, Column.MISSES :] = (count_L[:, None] - hits_LM).sum(0)
    return counts_SC


class Recency:
    """The pages of each lane, the most recently used one first; those never used come last. One
    thread."""

    def __init__(self, num_lanes: int, num_pages: int, *, device: torch.device) -> None:
        self._places_P = torch.arange(num_pages, device=device)
        self._stack_LP = self._places_P.repeat(num_lanes, 1)
        self._num_seen_L1 = torch.zeros((num_lanes, 1), dtype=torch.int64, device=device)

    def touch(self, selected_LP: Tensor, *, capacity_LM: Tensor) -> tuple[Tensor, Tensor]:
        """Use the pages where ``selected``, bool, is set. Returns how many of them had been used
        before, (L, 1), and were among the ``capacity`` most recently used pages, (L, M)."""
        flags_LP = selected_LP.gather(1, self._stack_LP)
        upto_LP = flags_LP.cumsum(1)  # selected pages at this place of the stack or before it
        hits_LX = torch.nn.functional.pad(upto_LP, (1, 0))
        seen_L1 = hits_LX.gather(1, self._num_seen_L1)
        hits_LM = hits_LX.gather(1, torch.minimum(capacity_LM, self._num_seen_L1))
        count_L1 = upto_LP[:, -1:]
        by_page_LP = selected_LP.cumsum(1).gather(1, self._stack_LP)
        others_LP = self._places_P - upto_LP
        place_LP = count_L1 + torch.where(flags_LP, -by_page_LP, others_LP)
        self._stack_LP = torch.empty_like(place_LP).scatter_(1, place_LP, self._stack_LP)
        self._num_seen_L1 += count_L1 - seen_L1
        return seen_L1, hits_LM


def _masks(pages_SLK: Tensor, num_pages: int) -> Iterator[Tensor]:
    """Of each step, where a page is selected: bool (L, P)."""
    _, num_lanes, _ = pages_SLK.shape
    for pages_LK in pages_SLK:
        # The column after the last takes the padding.
        columns_LK = pages_LK.long()
        columns_LK = torch.where(columns_LK < 0, num_pages, columns_LK)
        mask_LX = torch.zeros((num_lanes, num_pages + 1), dtype=torch.bool, device=pages_LK.device)
        yield mask_LX.scatter_(1, columns_LK, True)[:, :num_pages]
