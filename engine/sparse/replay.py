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
from sparsed.engine.step_input import Pages

ROW_SHIFT, LANE_SHIFT = 61, 37  # steps between two rows, two lanes: no two of them are in phase
FORETOLD_OF = 3  # measured on SmolLM2: 58 to 68 percent of what would be missing is foretold
_SCATTER = 7919  # so that the pages left out are spread over a request
ANCHOR_PAGES = 256  # recorded pages move when a request has grown by so many


class SelectionTrace:
    """Every lane replays one of the recorded lanes, shifted in time.

    A lane's recorded pages are spread evenly over the pages that a request has: as many as it ever
    touches, in their order. Recorded lanes that touch more than a request has are left to longer
    ones. A request that has too few for every lane, or that selects another number of pages than was
    recorded, keeps its own selections. ``selection_SYK``: page ids, none twice in a step.
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
        by_need_Y = np.argsort(touched_Y, kind="stable")
        ranks_SYK, touched_Y = ranks_SYK[:, by_need_Y], touched_Y[by_need_Y]
        self.num_pages = int(touched_Y.min())  # that a request needs, for one lane to be replayed
        self._ranks_SYK = torch.from_numpy(ranks_SYK).int().to(device)
        self._touched_Y = torch.from_numpy(touched_Y).int().to(device)
        lanes = torch.arange(num_layers * num_heads, device=device)
        self._lanes_L1H = lanes.view(num_layers, 1, num_heads)
        self._pages_LBHK = self._ranks_SYK.new_empty((0, 0, 0, 0))
        self._replays_B11 = torch.zeros((0, 1, 1), dtype=torch.bool, device=device)

    def replays(self, num_selected: int, *, num_full: int) -> bool:
        """Whether a step replays for a request that selects so many of its full pages; ``begin``
        asks the same on the device."""
        anchor = num_full // ANCHOR_PAGES * ANCHOR_PAGES
        return num_selected == self._ranks_SYK.shape[2] and anchor >= self.num_pages

    def begin(self, rows_B: Tensor, *, positions_B: Tensor, pages: Pages, width: int) -> None:
        """Look up the pages of all layers for a step; ``width``: columns of its selections."""
        num_steps, _, num_columns = self._ranks_SYK.shape
        rows_B1, positions_B1 = rows_B.long()[:, None], positions_B.long()[:, None]
        steps_LBH = positions_B1 + rows_B1 * ROW_SHIFT + self._lanes_L1H * LANE_SHIFT
        anchor_B = pages.num_full_B // ANCHOR_PAGES * ANCHOR_PAGES
        num_lanes_B1 = (self._touched_Y <= anchor_B[:, None]).sum(1, keepdim=True)
        lanes_LBH = (self._lanes_L1H + rows_B1) % num_lanes_B1.clamp(min=1)
        ranks_LBHK = self._ranks_SYK[steps_LBH % num_steps, lanes_LBH]
        spread_LBHK = ranks_LBHK * anchor_B[:, None, None]
        spread_LBHK = spread_LBHK // self._touched_Y[lanes_LBH][..., None]
        spread_LBHK = torch.where(ranks_LBHK < 0, -1, spread_LBHK)
        spread_LBHK = F.pad(spread_LBHK, (0, max(0, width - num_columns)), value=-1)
        self._pages_LBHK = spread_LBHK[..., :width].contiguous()
        replays_B = (pages.count_B == num_columns) & (anchor_B >= self.num_pages)
        self._replays_B11 = replays_B[:, None, None]

    def overwrite(self, layer: int, pages_BHK: Tensor) -> None:
        """Put recorded pages in the place of selected ones, rising, then -1."""
        torch.where(self._replays_B11, self._pages_LBHK[layer], pages_BHK, out=pages_BHK)

    def foretell(self, layer: int, pages_BHK: Tensor) -> None:
        """The same a layer early, but for one page in ``FORETOLD_OF``: queries
        foretell most of the next layer's pages, and a recording does not say which."""
        self.overwrite(layer, pages_BHK)
        pages_BHK.masked_fill_(pages_BHK * _SCATTER % FORETOLD_OF == 0, -1)


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
    selection = recording.full_selection(steps, page_size=page_size, token_budget=token_budget)
    return SelectionTrace(
        selection.astype(np.int64), num_layers=num_layers, num_heads=num_heads, device=device
    )
