"""Misses and attention recall as they were recorded, between and beyond their points.

Budgets count as shares of the context: what was recorded after 6,144 tokens stands for the same
share of a longer one. Shape legend: N settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESULTS: Final = Path(__file__).parent / "results"
CONTEXT_TOKENS: Final = 6144.0  # of the recorded selections


class Curves:
    """Recorded misses and recall, between and beyond their points."""

    def __init__(self, directory: Path = RESULTS) -> None:
        table = json.loads((directory / "miss-curves.json").read_text())
        self._residencies = np.log(np.array(table["residencies"]))
        self._rows = {
            size: sorted(
                (row["token_budget"], np.log(np.array(row["miss_frac"])))
                for row in table["rows"]
                if row["page_size"] == size
            )
            for size in {row["page_size"] for row in table["rows"]}
        }
        self._loss_share, self._log_loss, self._page_slope = _recall_points(directory)

    def miss_frac(self, page_size: Floats, share: Floats, residency: Floats) -> Floats:
        """Of selected pages; budgets beyond the recorded ones miss like the nearest."""
        missed = np.zeros_like(share)
        for size, rows in self._rows.items():
            here = page_size == size
            budgets = np.log([budget for budget, _ in rows])
            wanted = np.log(np.clip(share[here] * CONTEXT_TOKENS, 1.0, None))
            at = np.array(
                [np.interp(np.log(residency[here]), self._residencies, log) for _, log in rows]
            )
            place = np.interp(wanted, budgets, np.arange(len(rows)))
            low = np.minimum(place.astype(int), len(rows) - 2)
            column = np.arange(at.shape[1])
            frac = place - low
            missed[here] = np.exp((1 - frac) * at[low, column] + frac * at[low + 1, column])
        return missed

    def recall(self, page_size: Floats, share: Floats) -> Floats:
        """Share of attention mass read; everything is read from a share of one on."""
        log = np.log(np.clip(share, 1e-3, 1.0))
        slope = (self._log_loss[-1] - self._log_loss[0]) / (
            self._loss_share[-1] - self._loss_share[0]
        )
        inside = np.interp(log, self._loss_share, self._log_loss)
        beyond = log - np.clip(log, self._loss_share[0], self._loss_share[-1])
        loss = np.exp(inside + slope * beyond + self._page_slope * np.log(page_size / 32.0))
        return np.where(share >= 1.0, 1.0, 1.0 - np.clip(loss, 0.0, 0.9))


def _recall_points(directory: Path) -> tuple[Floats, Floats, float]:
    """Log share and log loss at pages of 32 tokens, and how the loss grows with the page."""
    losses: dict[tuple[int, float], list[float]] = {}
    for name in ("quality-budgets", "quality-page-32", "quality-smollm2"):
        result = json.loads((directory / f"{name}.json").read_text())
        for row in result["rows"]:
            choice = row["choice"]
            if choice["method"] == "cuboid-mean":
                key = (choice["page_size"], choice["token_budget"] / result["context_tokens"])
                losses.setdefault(key, []).append(1.0 - row["recall_mean"])
    mean = {key: float(np.mean(values)) for key, values in losses.items()}
    coarse = sorted((share, loss) for (size, share), loss in mean.items() if size == 32)
    (fine,) = [(share, loss) for (size, share), loss in mean.items() if size == 16]
    same = next(loss for share, loss in coarse if share == fine[0])
    shares, values = zip(*coarse, strict=True)
    return np.log(shares), np.log(values), float(np.log(same / fine[1]) / np.log(2))
