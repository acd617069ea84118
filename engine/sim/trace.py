"""Selections as a simulation replays them: which pages each lane touches, step by step.

Shape legend: S steps, L lanes, K selected pages, M pages ranked next, P pages, X any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sparsed.core import WINDOW_STEPS, InputError
from sparsed.engine.evaluate.recording import PAD, Recording

Ints = npt.NDArray[np.int64]
Pages = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

_CHUNK_STEPS: Final = 64  # a selection is cut from all ranks: bounds the memory that takes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """``pages`` (S, L, K), ascending, and ``ahead`` (S, L, M), the pages ranked next, best first.

    Pages of a lane are numbered from 0 in the order of their ids, those alone that it ever
    touches; PAD where a lane has fewer. Together the pages of all lanes are numbered by *keys*,
    ``lane * num_pages + page``.
    """

    pages_SLK: Pages
    ahead_SLM: Pages
    num_pages: int  # of the lane that touches the most

    @property
    def num_steps(self) -> int:
        return len(self.pages_SLK)

    @property
    def num_lanes(self) -> int:
        num_lanes: int = self.pages_SLK.shape[1]
        return num_lanes

    def count(self, step: int) -> Ints:
        """Pages that each lane selects, (L,)."""
        count_L: Ints = np.count_nonzero(self.pages_SLK[step] != PAD, axis=1)
        return count_L

    def keys(self, step: int) -> Ints:
        """Keys of the pages selected, ascending, (X,)."""
        return self._flat(self.pages_SLK[step])

    def keys_ahead(self, step: int, *, room_L: Ints) -> Ints:
        """Keys of the first ``room`` pages of each lane that are ranked next, ascending, (X,)."""
        ahead_LM = self.ahead_SLM[step]
        fits_LM = np.arange(ahead_LM.shape[1]) < room_L[:, None]
        return np.sort(self._flat(np.where(fits_LM, ahead_LM, PAD)))

    def _flat(self, pages_LX: Pages) -> Ints:
        keys_LX: Ints = pages_LX + self.num_pages * np.arange(self.num_lanes)[:, None]
        is_page_LX: Bools = pages_LX != PAD
        return keys_LX[is_page_LX]


class StepCounts(NamedTuple):
    """Pages of all lanes in each step, (S,)."""

    selected_S: Ints
    repeated_S: Ints  # selected in the step before as well
    window_S: Ints  # distinct pages of the newest 12 steps
    first_touch_S: Ints  # never selected before


def make_trace(pages_SLK: npt.NDArray[Any], ahead_SLM: npt.NDArray[Any] | None = None) -> Trace:
    """From selections of any integer type, in any order, negative ids being padding.

    ``ahead`` holds no page of the selection of its step. None: nothing is ranked next.
    """
    num_steps, num_lanes, num_selected = pages_SLK.shape
    if ahead_SLM is None:
        ahead_SLM = np.empty((num_steps, num_lanes, 0), dtype=np.int32)
    touched_SLX = np.concatenate([pages_SLK, ahead_SLM], axis=2).astype(np.int64)
    touched_SLX[touched_SLX < 0] = PAD
    spare = int(touched_SLX.max(initial=0)) + 1  # the column of the padding, PAD counted from 0
    lanes_L1 = np.arange(num_lanes)[:, None]
    is_touched_LP = np.zeros((num_lanes, spare + 1), dtype=bool)
    is_touched_LP[lanes_L1, touched_SLX] = True
    is_touched_LP[:, spare] = False
    number_LP = (is_touched_LP.cumsum(axis=1) - 1).astype(np.int32)
    number_LP[:, spare] = PAD
    numbered_SLX = number_LP[lanes_L1, touched_SLX]
    return Trace(
        pages_SLK=np.sort(numbered_SLX[..., :num_selected], axis=2),
        ahead_SLM=numbered_SLX[..., num_selected:],
        num_pages=int(is_touched_LP.sum(axis=1).max(initial=1)),
    )


def trace_recording(
    recording: Recording, *, page_size: int, token_budget: int, prefetch_pages: int = 0
) -> Trace:
    """What a selector with such pages and such a budget selects, and ranks next.

    Errors: InputError as ``Recording.selection``, and naming ``prefetch`` beyond the ranks.
    """
    num_steps, _, num_ranks = recording.ranked_SLR.shape
    recording.selection(range(0), page_size=page_size, token_budget=token_budget)
    num_selected = token_budget // page_size - 1
    most = num_ranks * recording.header.page_size // page_size - num_selected
    if prefetch_pages > most:
        raise InputError(
            f"prefetch={prefetch_pages}: the recording ranks {most} pages of {page_size} tokens "
            f"beyond a budget of {token_budget}; take at most so many, or record more ranks",
            field="prefetch",
        )
    chunks = [
        recording.selection(
            range(start, min(start + _CHUNK_STEPS, num_steps)),
            page_size=page_size,
            token_budget=token_budget + prefetch_pages * page_size,
        )
        for start in range(0, num_steps, _CHUNK_STEPS)
    ]
    ranked_SLX = np.concatenate(chunks)
    return make_trace(ranked_SLX[..., :num_selected], ranked_SLX[..., num_selected:])


def count_steps(trace: Trace) -> StepCounts:
    """What the steps of a trace take over from those before them, whatever holds their pages."""
    last_X = np.full(trace.num_lanes * trace.num_pages, -WINDOW_STEPS - 1)
    touched_X = np.zeros(len(last_X), dtype=bool)
    counts_SC = np.zeros((trace.num_steps, len(StepCounts._fields)), dtype=np.int64)
    for step in range(trace.num_steps):
        keys_X = trace.keys(step)
        repeated = np.count_nonzero(last_X[keys_X] == step - 1)
        first = np.count_nonzero(~touched_X[keys_X])
        last_X[keys_X] = step
        touched_X[keys_X] = True
        window = np.count_nonzero(last_X > step - WINDOW_STEPS)
        counts_SC[step] = len(keys_X), repeated, window, first
    return StepCounts(*counts_SC.T)
