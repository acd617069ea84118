"""A measurement as a process of its own: how it answers whoever started it.

Standard output carries lines of JSON, each an object with one key that is the name of a value of
the vocabulary: ``LoadProgress`` on the way, then the result, or ``EngineFailed``.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsed.core import EngineFailed, ExitCode, InputError, LoadProgress, StartError

Progress = Callable[[str, float], None]


def answer(measure: Callable[[Progress], object]) -> ExitCode:
    """Measure and say the result, a value of the vocabulary; the exit status for the shell."""
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
