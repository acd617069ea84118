"""A measurement by a process that may load torch: what to measure goes in, progress comes out."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import IO, TypeVar

import msgspec

from sparsed.controller.engine_process import worker_environment
from sparsed.core import EngineFailed, ExitCode, LoadProgress, StartError

Answer = TypeVar("Answer")
Progress = Callable[[str, float], None]


def run_measurement(
    command: Sequence[str], request: bytes, *, answer: type[Answer], on_progress: Progress
) -> Answer:
    """What ``command`` answers to ``request`` on its standard input, in the lines of
    ``engine.process``. StartError with its words, or with its exit status."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=worker_environment()) as process:
        try:
            return _listen(process, request, answer=answer, on_progress=on_progress)
        finally:
            process.terminate()  # nothing if it has ended


def _listen(
    process: subprocess.Popen[bytes],
    request: bytes,
    *,
    answer: type[Answer],
    on_progress: Progress,
) -> Answer:
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):  # it has ended already; its status says how
        process.stdin.write(request)
        process.stdin.close()
    for value in _values(process.stdout, (answer, EngineFailed, LoadProgress)):
        if isinstance(value, answer):
            return value
        if isinstance(value, EngineFailed):
            raise StartError(value.message, code=ExitCode(value.exit_code))
        if isinstance(value, LoadProgress):
            on_progress(value.phase, value.frac)
    raise StartError(f"the measuring process {_ending(process.wait())}", code=ExitCode.SOFTWARE)


def _ending(status: int) -> str:
    """How a process ended that did not say why, in words."""
    if status < 0:
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"ended with status {status}; its words are above"


def _values(lines: IO[bytes], kinds: Sequence[type]) -> Iterator[object]:
    """What the lines say; a line that a library wrote in between goes to standard error."""
    for line in lines:
        value = _value(line, kinds)
        if value is None:
            sys.stderr.write(line.decode(errors="replace"))
        else:
            yield value


def _value(line: bytes, kinds: Sequence[type]) -> object | None:
    """The value of one of ``kinds`` that a line is, if it is one."""
    try:
        tagged = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        for kind in kinds:
            if tagged.keys() == {kind.__name__}:
                value: object = msgspec.json.decode(tagged[kind.__name__], type=kind)
                return value
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    return None
