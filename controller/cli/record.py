"""``sparsed record``: the requests of a daemon as a trace, without their texts."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed.controller.cli.output import complain
from sparsed.controller.cli.session import ERROR, StateDirOption, connect

if TYPE_CHECKING:
    from sparsed.controller.client import AdminClient
    from sparsed.core import RecordedRequest

POLL_S = 0.25


def record(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The trace, JSONL; replaced when all is there."
        ),
    ],
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            help="Note requests that arrive in this time. Default: until Ctrl-C.",
        ),
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Note at most so many requests. Default: all."),
    ] = None,
    state_dir: StateDirOption = None,
) -> None:
    """Record what a daemon serves as a trace for tune and bench serve; no text is kept.

    A request is noted once it has ended: arrival, tokens in and out, max_tokens, and numbers of its
    prefix blocks, which mean nothing outside the trace. After the last arrival those that still
    run are waited for; Ctrl-C leaves them out. One recording at a time.
    """
    from sparsed.controller.recording_file import write_recording
    from sparsed.controller.writable import check_replaceable

    check_replaceable(output, option="output")
    with connect(state_dir, write=True) as client:
        found, num_left_out, lost = _record(client, seconds=seconds, max_requests=max_requests)
    left_out = f", {num_left_out} left out" if num_left_out else ""
    if not found:
        complain(f"no request ended with a token{left_out}; nothing is written")
        raise typer.Exit(ERROR)
    try:
        write_recording(output, found)
    except OSError as error:
        complain(f"cannot write {output}: {error.strerror}")
        raise typer.Exit(ERROR) from None
    print(f"{output}: {len(found)} requests{left_out}")
    if lost:
        complain(f"the recording ended early: {lost}")
        raise typer.Exit(ERROR)


def _record(
    client: AdminClient, *, seconds: float | None, max_requests: int | None
) -> tuple[list[RecordedRequest], int, str]:
    """What was recorded, how many were left out, and why it ended before its time, if it did."""
    from sparsed.controller.client import CallFailed, DaemonUnreachable
    from sparsed.core import InputError

    found: list[RecordedRequest] = []
    num_left_out, is_over = 0, False
    with _ctrl_c() as stop:
        number = client.start_recording(duration_s=seconds, max_requests=max_requests)
        complain(f"recording {number}; Ctrl-C ends it")
        while not is_over:
            time.sleep(POLL_S)
            try:
                part = client.take_recording(number, stop=bool(stop))
            except (CallFailed, DaemonUnreachable, InputError) as error:
                return found, num_left_out, str(error)
            found += part.requests
            num_left_out, is_over = part.num_left_out, part.is_over
    return found, num_left_out, ""


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Not empty once it was pressed: a call under way is not broken off, what it brings counts."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
