"""Whether something can be written, before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from sparsed.core import InputError


def check_file(file: Path | None, *, option: str) -> None:
    """InputError naming the option unless the file can be written."""
    if file is None:
        return
    if not file.exists():
        _check_place(file, option=option)
    elif file.is_dir():
        raise InputError(f"--{option} {file}: is a directory; give a file", field=option)
    elif not os.access(file, os.W_OK):
        raise InputError(f"--{option} {file}: cannot be written", field=option)


def check_replaceable(file: Path, *, option: str) -> None:
    """InputError naming the option unless a new file can be written and take this one's place."""
    check_file(file, option=option)
    _check_place(file.resolve(), option=option)
    if file.exists() and not file.is_file():
        raise InputError(f"--{option} {file}: is no regular file", field=option)


def check_directory(directory: Path | None, *, option: str) -> None:
    """Make the directory; InputError naming the option if no file can be written there."""
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--{option} {directory}: {error.strerror}", field=option) from None
    _try(directory, words=f"--{option} {directory}: cannot be written to", option=option)


def _check_place(file: Path, *, option: str) -> None:
    directory = file.absolute().parent
    if not directory.is_dir():
        raise InputError(f"--{option} {file}: there is no such directory", field=option)
    _try(directory, words=f"--{option} {file}: cannot be written", option=option)


def _try(directory: Path, *, words: str, option: str) -> None:
    """Write there, for root may do anything by its rights alone, and find a place read-only."""
    try:
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(f"{words} ({error.strerror})", field=option) from None
