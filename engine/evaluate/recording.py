"""Recorded rankings of pages, step by step: a file for replay and for the simulation of caches.

Shape legend: S steps, L lanes, R ranks, C candidates, K selected pages, X any.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sparsed.core import ExitCode, InputError

FORMAT_VERSION: Final = 1
PAD: Final = -1  # a lane has fewer full pages than there are ranks

Pages = npt.NDArray[np.int32]

_AGAIN: Final = "record it again"

_MINIMA: Final[Mapping[str, int]] = {
    "context_tokens": 1,
    "page_size": 1,
    "token_budget": 1,
    "num_kv_heads": 1,
}  # of the other numbers: 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingHeader:
    """What was recorded. Lane l is KV head ``l % num_kv_heads`` of layer
    ``dense_layers + l // num_kv_heads``. Errors: InputError naming a field that is wrong."""

    model: str
    text: str
    method: str
    commit: str  # of the code that recorded
    context_tokens: int  # step 0 is the decode step at this position
    page_size: int  # tokens of a recorded page, the finest grain
    token_budget: int  # of the steps as they were run, the partial last page included
    sink_pages: int  # first full pages, of any page size, that are always selected
    recent_pages: int  # last full ones
    num_kv_heads: int
    dense_layers: int  # the first ones, which have no lanes

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_field(item.name, getattr(self, item.name), is_text=item.type == "str")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recording:
    """Of every step and lane the best full pages, best first: ``ranked`` (S, L, R), PAD after the
    last page of a lane that has fewer. The page of the step's own position is never listed.

    Errors: InputError naming the field if ``ranked`` does not fit the header.
    """

    header: RecordingHeader
    ranked_SLR: Pages

    def __post_init__(self) -> None:
        _check_ranked(self.header, self.ranked_SLR)

    def selection(self, step_range: range, *, page_size: int, token_budget: int) -> Pages:
        """Pages (S, L, K) that a selector with pages of ``page_size`` tokens selects in those
        steps: K = token_budget / page_size - 1 full pages, the partial one comes on top.

        First the sinks and, newest first, the recent pages; then the others, best first. A page
        ranks by its best recorded part. PAD where a lane has fewer full pages.
        Errors: InputError for pages that are no multiple of the recorded ones, for a budget below
        the pages always selected or beyond what the ranks can fill, for steps not recorded.
        """
        steps_S = np.asarray(step_range, dtype=np.int64)
        count = self._check(steps_S, page_size=page_size, token_budget=token_budget)
        num_full_S = (self.header.context_tokens + steps_S) // page_size
        forced_SX = self._forced(num_full_S)
        ranked_SLR = self.ranked_SLR[steps_S].astype(np.int64)
        ranked_SLR //= page_size // self.header.page_size  # floors: padding stays negative
        num_steps, num_lanes, _ = ranked_SLR.shape
        forced_SLX = np.broadcast_to(forced_SX[:, None], (num_steps, num_lanes, forced_SX.shape[1]))
        candidates_SLC = np.concatenate([forced_SLX, ranked_SLR], axis=-1)
        candidates_SLC[candidates_SLC >= num_full_S[:, None, None]] = PAD
        return _first_distinct(candidates_SLC, count=count)

    def full_selection(self, step_range: range, *, page_size: int, token_budget: int) -> Pages:
        """``selection`` without padding. Errors: as there, and InputError for a context that was no
        longer than the budget."""
        selection = self.selection(step_range, page_size=page_size, token_budget=token_budget)
        if (selection == PAD).any():
            raise InputError(
                f"token_budget={token_budget} takes all of the {self.header.context_tokens} tokens "
                "that were recorded, so that there was nothing to select",
                field="token_budget",
            )
        return selection

    def _forced(self, num_full_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Pages always selected, (S, X); those that do not exist are beyond the full ones or
        negative."""
        sinks_SX = np.broadcast_to(
            np.arange(self.header.sink_pages), (len(num_full_S), self.header.sink_pages)
        )
        recent_SX = num_full_S[:, None] - 1 - np.arange(self.header.recent_pages)
        return np.concatenate([sinks_SX, recent_SX], axis=1)

    def _check(self, steps_S: npt.NDArray[np.int64], *, page_size: int, token_budget: int) -> int:
        """Full pages of a selection, if the recording can tell them."""
        grain = self.header.page_size
        num_steps, _, num_ranks = self.ranked_SLR.shape
        if page_size < grain or page_size % grain:
            raise InputError(
                f"page_size={page_size} is no multiple of {grain}, the page size of the recording",
                field="page_size",
            )
        lowest = (self.header.sink_pages + self.header.recent_pages + 1) * page_size
        highest = (num_ranks * grain // page_size + 1) * page_size
        if token_budget % page_size or not lowest <= token_budget <= highest:
            raise InputError(
                f"token_budget={token_budget} must be a multiple of page_size={page_size} from "
                f"{lowest} to {highest}; more needs a recording of more ranks",
                field="token_budget",
            )
        if len(steps_S) and (steps_S.min() < 0 or steps_S.max() >= num_steps):
            raise InputError(
                f"steps from {steps_S.min()} to {steps_S.max()}: only 0 to {num_steps - 1} were "
                "recorded",
                field="step_range",
            )
        return token_budget // page_size - 1


def write_recording(path: Path, recording: Recording) -> None:
    """Write a compressed .npz under exactly that name, in the smallest integers that hold it.

    Errors: OSError.
    """
    header = {"version": FORMAT_VERSION, **asdict(recording.header)}
    ranked_SLR = recording.ranked_SLR
    narrow = ranked_SLR.max(initial=0) <= np.iinfo(np.int16).max
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            header=np.array(json.dumps(header)),
            ranked=ranked_SLR.astype(np.int16 if narrow else np.int32),
        )


def read_recording(path: Path) -> Recording:
    """Errors: InputError naming the file and the field that is missing or broken."""
    if not path.is_file():
        raise InputError(f"{path} is no file", field="recording")
    try:
        _check_whole(path)
        with np.load(path, allow_pickle=False) as arrays:
            return _parse(arrays)
    except InputError as error:
        raise InputError(f"{path}: {error}", field=error.field, code=ExitCode.DATA) from None
    except (OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); copy it anew, or {_AGAIN}",
            field="recording",
            code=ExitCode.DATA,
        ) from None


def _check_whole(path: Path) -> None:
    """numpy parses what it reads before the checksum of all of it is known."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise InputError(
            f"no whole .npz ({error}); copy it anew, or {_AGAIN}", field="recording"
        ) from None
    if broken is not None:
        raise InputError(f"{broken} is damaged; copy it anew, or {_AGAIN}", field="recording")


def _parse(arrays: Mapping[str, npt.NDArray[Any]]) -> Recording:
    for name in ("header", "ranked"):
        if name not in arrays:
            raise InputError(f"array {name} is missing; {_AGAIN}", field=name)
    try:
        values = json.loads(str(arrays["header"]))
    except json.JSONDecodeError as error:
        raise InputError(f"header is no JSON ({error}); {_AGAIN}", field="header") from None
    if not isinstance(values, dict):
        raise InputError(f"header is no JSON object; {_AGAIN}", field="header")
    version = values.pop("version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"version={version!r} of the format is not known, {FORMAT_VERSION} is; read it with "
            "the release that wrote it, or record it again",
            field="version",
        )
    names = {item.name for item in fields(RecordingHeader)}
    for name in sorted(names ^ values.keys()):
        fault = "missing" if name in names else "unknown"
        raise InputError(f"{name} is {fault} in the header; {_AGAIN}", field=name)
    return Recording(header=RecordingHeader(**values), ranked_SLR=_integers(arrays["ranked"]))


def _integers(ranked: npt.NDArray[Any]) -> Pages:
    if ranked.dtype not in (np.int16, np.int32):
        raise InputError(f"ranked is {ranked.dtype}, not int16 or int32; {_AGAIN}", field="ranked")
    return ranked.astype(np.int32)


def _check_field(name: str, value: object, *, is_text: bool) -> None:
    if is_text:
        if not isinstance(value, str):
            raise InputError(f"{name}={value!r} is no string; {_AGAIN}", field=name)
        return
    minimum = _MINIMA.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(
            f"{name}={value!r} is no whole number from {minimum} up; {_AGAIN}", field=name
        )


def _check_ranked(header: RecordingHeader, ranked_SLR: Pages) -> None:
    if ranked_SLR.ndim != 3:
        raise InputError(
            f"ranked has {ranked_SLR.ndim} dimensions, not 3 (steps, lanes, ranks); {_AGAIN}",
            field="ranked",
        )
    num_steps, num_lanes, num_ranks = ranked_SLR.shape
    if num_lanes % header.num_kv_heads:
        raise InputError(
            f"ranked has {num_lanes} lanes, no multiple of num_kv_heads={header.num_kv_heads}; "
            f"{_AGAIN}",
            field="ranked",
        )
    num_full_S = (header.context_tokens + np.arange(num_steps)) // header.page_size
    step = _wrong_step(np.sort(ranked_SLR, axis=-1), num_full_S)
    if step is not None:
        raise InputError(
            f"ranked does not hold, in every lane of step {step}, different pages from 0 to "
            f"{num_full_S[step] - 1}, as many as there are up to {num_ranks}, then {PAD}; {_AGAIN}",
            field="ranked",
        )


def _wrong_step(sorted_SLR: Pages, num_full_S: npt.NDArray[np.int64]) -> int | None:
    """The first step whose lanes, each in ascending order, do not hold padding exactly where
    there are no more full pages, and else different full pages."""
    absent_SR = np.arange(sorted_SLR.shape[-1]) < sorted_SLR.shape[-1] - num_full_S[:, None]
    wrong_SLR = np.where(absent_SR[:, None], sorted_SLR != PAD, sorted_SLR < 0)
    wrong_SLR |= sorted_SLR >= num_full_S[:, None, None]
    wrong_SLR[..., 1:] |= (sorted_SLR[..., 1:] == sorted_SLR[..., :-1]) & ~absent_SR[:, None, 1:]
    wrong_S = wrong_SLR.any((1, 2))
    return int(wrong_S.argmax()) if wrong_S.any() else None


def _first_distinct(candidates_SLC: npt.NDArray[np.int64], *, count: int) -> Pages:
    """The first ``count`` different pages of each lane, in their order, PAD behind them."""
    by_page_SLC = candidates_SLC.argsort(axis=-1, kind="stable")
    sorted_SLC = np.take_along_axis(candidates_SLC, by_page_SLC, axis=-1)
    wanted_SLC = sorted_SLC >= 0
    wanted_SLC[..., 1:] &= sorted_SLC[..., 1:] != sorted_SLC[..., :-1]
    first_SLC = np.empty_like(wanted_SLC)
    np.put_along_axis(first_SLC, by_page_SLC, wanted_SLC, axis=-1)
    place_SLC = np.where(first_SLC, first_SLC.cumsum(-1) - 1, count)
    pages_SLX = np.full((*candidates_SLC.shape[:2], count + 1), PAD, dtype=np.int32)
    np.put_along_axis(pages_SLX, np.minimum(place_SLC, count), candidates_SLC, axis=-1)
    return pages_SLX[..., :count]
