"""Whether a recording can stand in for the selections of a start, told before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from sparsed.core import InputError, Knobs, SparseMethod
from sparsed.engine.evaluate.recording import Recording, read_recording

FIELD = "selection_trace"


def find_selection_trace(file: Path | None, *, knobs: Knobs) -> str | None:
    """The absolute path of a recording, None where none is asked for; reads all of the file.

    Errors: InputError of the field ``selection_trace`` for a file that is no recording, that
    cannot tell selections of this page size and budget, or that no step would replay.
    """
    if file is None:
        return None
    if not file.is_file():
        raise InputError(
            f"{FIELD}: {file} is no file; give a recording of selections, as "
            "benchmarks/record_selection.py writes them",
            field=FIELD,
        )
    if knobs.sparse_method == SparseMethod.DENSE:
        raise InputError(
            f"{FIELD}: sparse_method=dense selects nothing that {file} could replace; "
            "give another sparse_method, or drop the recording",
            field=FIELD,
        )
    try:
        recording = read_recording(file)
    except InputError as error:
        raise InputError(f"{FIELD}: {error}", field=FIELD, code=error.code) from None
    _check_fits(recording, file, knobs=knobs)
    return str(file.resolve())


def _check_fits(recording: Recording, file: Path, *, knobs: Knobs) -> None:
    page_size, token_budget = knobs.page_size, knobs.token_budget
    try:
        recording.full_selection(range(1), page_size=page_size, token_budget=token_budget)
    except InputError as error:
        raise InputError(
            f"{FIELD}: {file}: {error}; give such a page_size and token_budget, or another "
            "recording",
            field=FIELD,
        ) from None
