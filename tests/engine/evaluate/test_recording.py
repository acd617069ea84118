"""Recordings: what is written is read, coarser selections against slow ones, broken files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sparsed.core import ExitCode, InputError
from sparsed.engine.evaluate.recording import (
    PAD,
    Recording,
    RecordingHeader,
    read_recording,
    write_recording,
)

GRAIN = 16
HEADER = RecordingHeader(
    model="tiny",
    text="words",
    method="quest",
    commit="0123abc",
    context_tokens=1000,
    page_size=GRAIN,
    token_budget=160,
    sink_pages=1,
    recent_pages=1,
    num_kv_heads=2,
    dense_layers=0,
)


def record(
    *, steps: int = 20, lanes: int = 4, ranks: int = 40, seed: int = 0, **header: Any
) -> Recording:
    """Random rankings of all full pages, cut after ``ranks``."""
    values = replace(HEADER, **header)
    rng = np.random.default_rng(seed)
    ranked = np.full((steps, lanes, ranks), PAD, dtype=np.int32)
    for step in range(steps):
        num_full = (values.context_tokens + step) // values.page_size
        for lane in range(lanes):
            best = rng.permutation(num_full)[:ranks]
            ranked[step, lane, : len(best)] = best
    return Recording(header=values, ranked_SLR=ranked)


def slow_selection(
    recording: Recording, step: int, lane: int, *, page_size: int, token_budget: int
) -> list[int]:
    """The selection of one lane, page by page."""
    header = recording.header
    num_full = (header.context_tokens + step) // page_size
    ranked = recording.ranked_SLR[step, lane].tolist()
    candidates = [
        *range(header.sink_pages),
        *(num_full - 1 - back for back in range(header.recent_pages)),
        *(page * header.page_size // page_size for page in ranked if page != PAD),
    ]
    pages: list[int] = []
    for page in candidates:
        if 0 <= page < num_full and page not in pages:
            pages.append(page)
    count = token_budget // page_size - 1
    return (pages + [PAD] * count)[:count]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recording with some arrays, or fields of the header, replaced; None: left out."""

    def write(*, fields: dict[str, Any] | None = None, **arrays: Any) -> Path:
        path = tmp_path / "recording.npz"
        write_recording(path, record())
        with np.load(path) as sound:
            values = {**json.loads(str(sound["header"])), **(fields or {})}
            values = {name: value for name, value in values.items() if value is not None}
            kept = {"header": np.array(json.dumps(values)), "ranked": sound["ranked"], **arrays}
        np.savez_compressed(path, **{name: a for name, a in kept.items() if a is not None})
        return path

    return write


@pytest.mark.parametrize(("context_tokens", "stored"), [(1000, np.int16), (600_000, np.int32)])
def test_what_is_written_is_read(tmp_path: Path, context_tokens: int, stored: type) -> None:
    recording = record(context_tokens=context_tokens, text='Wörter "und" mehr')
    path = tmp_path / "any.name"
    write_recording(path, recording)
    again = read_recording(path)
    assert again.header == recording.header
    np.testing.assert_array_equal(again.ranked_SLR, recording.ranked_SLR)
    with np.load(path) as arrays:
        assert arrays["ranked"].dtype == stored


def test_the_selection_at_the_grain_is_what_was_ranked_best() -> None:
    recording = record(sink_pages=0, recent_pages=0)
    pages = recording.selection(range(20), page_size=GRAIN, token_budget=11 * GRAIN)
    np.testing.assert_array_equal(pages, recording.ranked_SLR[..., :10])


@given(
    seed=st.integers(0, 999),
    ranks=st.integers(8, 80),
    context_tokens=st.integers(1, 1500),
    factor=st.sampled_from([1, 2, 3, 4]),
    sink_pages=st.integers(0, 2),
    recent_pages=st.integers(0, 2),
    data=st.data(),
)
@settings(max_examples=60)
def test_coarser_pages_rank_by_their_best_part(
    seed: int,
    ranks: int,
    context_tokens: int,
    factor: int,
    sink_pages: int,
    recent_pages: int,
    data: st.DataObject,
) -> None:
    recording = record(
        steps=24,
        lanes=2,
        ranks=ranks,
        seed=seed,
        context_tokens=context_tokens,
        sink_pages=sink_pages,
        recent_pages=recent_pages,
    )
    forced = sink_pages + recent_pages
    count = data.draw(st.integers(min(forced, ranks // factor), ranks // factor))
    assume(count >= forced)
    size = {"page_size": factor * GRAIN, "token_budget": (count + 1) * factor * GRAIN}
    pages = recording.selection(range(3, 24, 5), **size)
    expected = [
        [slow_selection(recording, step, lane, **size) for lane in range(2)]
        for step in range(3, 24, 5)
    ]
    np.testing.assert_array_equal(pages, np.array(expected).reshape(pages.shape))
    num_full = (context_tokens + np.arange(3, 24, 5)) // (factor * GRAIN)
    complete = (pages >= 0).sum(-1) == np.minimum(count, num_full)[:, None]
    assert complete.all()  # the ranks suffice for any budget that is accepted


def test_no_steps_have_no_selections() -> None:
    assert record().selection(range(0), page_size=GRAIN, token_budget=160).shape == (0, 4, 9)


@pytest.mark.parametrize(
    ("arguments", "field", "remedy"),
    [
        ({"page_size": 24}, "page_size", "no multiple of 16"),
        ({"page_size": 8}, "page_size", "no multiple of 16"),
        ({"token_budget": 42 * 16}, "token_budget", "from 48 to 656; more needs a recording"),
        ({"token_budget": 32}, "token_budget", "from 48 to 656"),
        ({"token_budget": 170}, "token_budget", "multiple of page_size=16"),
        ({"step_range": range(5, 21)}, "step_range", "only 0 to 19 were recorded"),
        ({"step_range": range(-1, 3)}, "step_range", "only 0 to 19 were recorded"),
    ],
)
def test_what_was_not_recorded_is_refused(
    arguments: dict[str, Any], field: str, remedy: str
) -> None:
    values = {"step_range": range(2), "page_size": GRAIN, "token_budget": 160, **arguments}
    with pytest.raises(InputError, match=remedy) as error:
        record().selection(values.pop("step_range"), **values)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("header", "field", "message"),
    [
        ({"version": 2}, "version", "version=2 .* read it with the release that wrote it"),
        ({"version": None}, "version", "version=None"),
        ({"model": None}, "model", "model is missing in the header; record it again"),
        ({"colour": 3}, "colour", "colour is unknown in the header"),
        ({"model": 3}, "model", "model=3 is no string"),
        ({"page_size": 0}, "page_size", "page_size=0 is no whole number from 1 up"),
        ({"sink_pages": -1}, "sink_pages", "from 0 up"),
        ({"token_budget": 1.5}, "token_budget", "token_budget=1.5"),
        ({"dense_layers": True}, "dense_layers", "dense_layers=True"),
        ({"num_kv_heads": 3}, "ranked", "4 lanes, no multiple of num_kv_heads=3"),
        ({"context_tokens": 500}, "ranked", "step 0, different pages from 0 to 30"),
    ],
)
def test_a_broken_header_is_named(
    write: Callable[..., Path], header: dict[str, Any], field: str, message: str
) -> None:
    refused(write(fields=header), field=field, message=message)


def shape_of(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.int16)


@pytest.mark.parametrize(
    ("arrays", "field", "message"),
    [
        ({"header": None}, "header", "array header is missing; record it again"),
        ({"ranked": None}, "ranked", "array ranked is missing"),
        ({"header": np.array("{")}, "header", "header is no JSON"),
        ({"header": np.array("[]")}, "header", "no JSON object"),
        ({"ranked": shape_of(4, 2, 3).astype(np.float32)}, "ranked", "float32, not int16"),
        ({"ranked": shape_of(4, 2)}, "ranked", "2 dimensions"),
        ({"ranked": shape_of(4, 3, 1)}, "ranked", "3 lanes"),
        ({"ranked": shape_of(4, 2, 2)}, "ranked", "step 0, different pages"),
        ({"ranked": shape_of(4, 2, 1) - 1}, "ranked", "as many as there are up to 1"),
        ({"ranked": shape_of(4, 2, 1) - 2}, "ranked", "from 0 to 61"),
        ({"ranked": shape_of(4, 2, 1) + 62}, "ranked", "from 0 to 61"),
    ],
)
def test_broken_arrays_are_named(
    write: Callable[..., Path], arrays: dict[str, Any], field: str, message: str
) -> None:
    refused(write(**arrays), field=field, message=message)


def refused(path: Path, *, field: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_recording(path)
    assert error.value.field == field
    assert error.value.code is ExitCode.DATA
    assert str(path) in str(error.value)


def test_what_is_no_recording_is_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    whole = write()
    whole.write_bytes(whole.read_bytes()[:-30])
    refused(whole, field="recording", message="no whole .npz .*; copy it anew, or record it again")
    other = tmp_path / "other.npy"
    np.save(other, np.zeros(3))
    refused(other, field="recording", message="no whole .npz")
    pickled = write(ranked=np.array([None]))
    refused(pickled, field="recording", message="cannot be read")
    with pytest.raises(InputError, match="is no file"):
        read_recording(tmp_path / "absent.npz")


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_is_seen_or_harmless(
    write: Callable[..., Path], data: st.DataObject
) -> None:
    path = write()
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read_recording(path)
    except InputError:
        return
    assert found.header == HEADER
    np.testing.assert_array_equal(found.ranked_SLR, record().ranked_SLR)
