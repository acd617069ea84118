"""A measurement by a process that may load torch: what to measure goes in, progress comes out."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

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
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended already; its status says how
            process.stdin.write(request)
            process.stdin.close()
        for line in process.stdout:
            ((name, body),) = msgspec.json.decode(line, type=dict[str, msgspec.Raw]).items()
            if name == answer.__name__:
                return msgspec.json.decode(body, type=answer)
            if name == "EngineFailed":
                failure = msgspec.json.decode(body, type=EngineFailed)
                raise StartError(failure.message, code=ExitCode(failure.exit_code))
            progress = msgspec.json.decode(body, type=LoadProgress)
            on_progress(progress.phase, progress.frac)
    raise StartError(
        f"the measuring process ended with status {process.returncode}; its words are above",
        code=ExitCode.SOFTWARE,
    )
