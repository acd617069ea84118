"""Selections of a recording in place of a step's own, so that a model of random weights moves pages
as a real one does.

Shape legend: S recorded steps, Y recorded lanes, K selected pages, B requests, L layers, H KV
heads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsed.engine.evaluate.recording import read_recording

ROW_SHIFT, LANE_SHIFT = 61, 37  # steps between two rows, two lanes: no two of them are in phase
ANCHOR_PAGES = 256  # recorded pages move when a request has grown by so many


class SelectionTrace:
    """Every lane replays one of the recorded lanes, shifted in time.

    A lane's recorded pages are spread evenly over the pages that a request has: as many as it ever
    touches, in their order. A request with fewer keeps its own selections. ``selection_SYK``: page
    ids, none twice in a step, -1: no page.
    """

    def __init__(
        self,
        selection_SYK: npt.NDArray[np.int64],
        *,
        num_layers: int,
        num_heads: int,
        device: torch.device,
    ) -> None:
        ranks_SYK, touched_Y = rank_pages(selection_SYK)
        self.num_pages = int(touched_Y.max())  # that a request needs
        self._ranks_SYK = torch.from_numpy(ranks_SYK).int().to(device)
        self._touched_Y = torch.from_numpy(touched_Y).int().to(device)
        lanes = torch.arange(num_layers * num_heads, device=device)
        self._lanes_L1H = lanes.view(num_layers, 1, num_heads)
        self._step_LBH = self._lane_LBH = self._lanes_L1H

    def begin(self, rows_B: Tensor, positions_B: Tensor) -> None:
        """Say which requests take part in a step, and where they are."""
        num_steps, num_lanes, _ = self._ranks_SYK.shape
        rows_B1, positions_B1 = rows_B.long()[:, None], positions_B.long()[:, None]
        steps_LBH = positions_B1 + rows_B1 * ROW_SHIFT + self._lanes_L1H * LANE_SHIFT
        self._step_LBH = steps_LBH % num_steps
        self._lane_LBH = (self._lanes_L1H + rows_B1) % num_lanes

    def overwrite(
        self, layer: int, pages_BHK: Tensor, *, count_B: Tensor, num_full_B: Tensor
    ) -> None:
        """Put recorded pages in the place of selected ones, rising, then -1."""
        lanes_BH, width = self._lane_LBH[layer], pages_BHK.shape[2]
        ranks_BHK = self._ranks_SYK[self._step_LBH[layer], lanes_BH]
        ranks_BHK = F.pad(ranks_BHK, (0, max(0, width - ranks_BHK.shape[2])), value=-1)
        anchor_B = num_full_B // ANCHOR_PAGES * ANCHOR_PAGES
        spread_BHK = ranks_BHK[..., :width] * anchor_B[:, None, None]
        spread_BHK = spread_BHK // self._touched_Y[lanes_BH][..., None]
        spread_BHK = torch.where(ranks_BHK[..., :width] < 0, -1, spread_BHK)
        replays_B = (count_B > 0) & (anchor_B >= self.num_pages)
        pages_BHK.copy_(torch.where(replays_B[:, None, None], spread_BHK, pages_BHK))


def rank_pages(
    selection_SYK: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The place of each page among those that its lane ever touches, rising within a step, then -1;
    and how many those are (Y,)."""
    last = np.iinfo(np.int64).max
    ordered_SYK = np.sort(np.where(selection_SYK < 0, last, selection_SYK), axis=-1)
    ranks_SYK = np.full_like(ordered_SYK, -1)
    touched_Y = np.ones(ordered_SYK.shape[1], dtype=np.int64)
    for lane in range(ordered_SYK.shape[1]):
        pages_SK = ordered_SYK[:, lane]
        touched = np.unique(pages_SK[pages_SK < last])
        touched_Y[lane] = max(1, len(touched))
        ranks_SYK[:, lane] = np.where(pages_SK < last, np.searchsorted(touched, pages_SK), -1)
    return ranks_SYK, touched_Y


def load_trace(
    path: Path,
    *,
    page_size: int,
    token_budget: int,
    num_layers: int,
    num_heads: int,
    device: torch.device,
) -> SelectionTrace:
    """The trace of a recording. Errors: InputError where it is none, or cannot tell selections of
    this page size and budget."""
    recording = read_recording(path)
    steps = range(len(recording.ranked_SLR))
    selection = recording.selection(steps, page_size=page_size, token_budget=token_budget)
    return SelectionTrace(
        selection.astype(np.int64), num_layers=num_layers, num_heads=num_heads, device=device
    )
