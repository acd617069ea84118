"""A measurement as a process of its own: how it answers whoever started it, and ends with it.

Standard output carries lines of JSON, each an object with one key that is the name of a value of
the vocabulary: ``LoadProgress`` on the way, then the result, or ``EngineFailed``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

from sparsed.core import EngineFailed, ExitCode, InputError, LoadProgress, StartError

Progress = Callable[[str, float], None]


_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_INTERRUPTED: Final = 128 + signal.SIGINT  # as a shell says it


def answer(measure: Callable[[Progress], object]) -> ExitCode:
    """Measure and say the result, a value of the vocabulary; the exit status for the shell.

    Ends with whoever started it. SystemExit without a word after Ctrl-C, or if nobody listens.
    """
    try:
        die_with_parent(os.getppid())  # one that is gone already closed our pipes
        return _answer(measure)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again
        sys.exit(_INTERRUPTED)


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when its parent ends, the process ``parent``; it ends right
    away if that is gone already, as it may be after an interpreter's start, which takes a while."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(ExitCode.UNAVAILABLE)


def _answer(measure: Callable[[Progress], object]) -> ExitCode:
    try:
        result = measure(lambda phase, frac: _say(LoadProgress(phase=phase, frac=frac)))
    except (InputError, StartError) as error:
        _say(EngineFailed(message=str(error), exit_code=error.code))
        return error.code
    _say(result)
    return ExitCode.OK


def _say(value: object) -> None:
    import msgspec  # the engine itself runs without

    line = msgspec.json.encode({type(value).__name__: value})
    print(line.decode(), flush=True)
