"""Directories that appear complete or not at all, made once by one of several processes."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

from sparsed.core import InputError


def publish(directory: Path, make: Callable[[Path], None]) -> None:
    """Unless ``directory`` exists, fill a partial one by ``make`` and rename it.

    A lock file beside it makes others wait; it is free again when its holder dies, and what the
    holder left is thrown away. Errors: those of ``make``; InputError if nothing can be written.
    """
    if directory.is_dir():
        return
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if directory.is_dir():
                return
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                partial.rename(directory)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{directory} cannot be made: {error}", field="model") from None
