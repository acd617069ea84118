"""What was really served, as sizes and times: requests are noted from their arrival to their end.

No text is kept. Blocks of a prompt are numbered in the order in which they are first seen; they are
told apart by a hash under a key that is drawn for each recording and never leaves this process.
"""

from __future__ import annotations

import secrets
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from sparsed.core import AddRequest, InputError, RecordedRequest, RecordingPart

BLOCK_TOKENS: Final = 512  # of a prefix block in traces
LEASE_S: Final = 60.0  # a recording that nobody takes from for so long is given up
PART_BLOCKS: Final = 100_000  # most block ids of one part, which bounds the message


@dataclass(kw_only=True, slots=True)
class _Recording:
    number: int
    began_s: float
    ends_s: float | None
    max_requests: int | None
    taken_s: float
    num_noted: int = 0
    num_left_out: int = 0
    is_stopped: bool = False
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    block_numbers: dict[bytes, int] = field(default_factory=dict)
    running: dict[str, tuple[float, AddRequest]] = field(default_factory=dict)
    ended: deque[RecordedRequest] = field(default_factory=deque)


class Recorder:
    """One recording at a time. Lives on the event loop; ``clock`` in seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recording: _Recording | None = None
        self._num_begun = 0

    def start(self, *, duration_s: float | None, max_requests: int | None) -> int:
        """Note requests that arrive from now on, up to either limit; returns an id.

        InputError: another recording runs.
        """
        running = self._current()
        if running is not None:
            raise InputError(
                f"recording {running.number} runs already, with {running.num_noted} requests so "
                f"far; end it first, or wait: it is given up when nobody has taken from it for "
                f"{LEASE_S:.0f} s"
            )
        now_s = self._clock()
        self._num_begun += 1
        self._recording = _Recording(
            number=self._num_begun,
            began_s=now_s,
            ends_s=None if duration_s is None else now_s + duration_s,
            max_requests=max_requests,
            taken_s=now_s,
        )
        return self._num_begun

    def take(self, number: int, *, stop: bool) -> RecordingPart:
        """What has ended since the last call. ``stop``: leave out what still runs.

        Once the part says that it is over, the recording is forgotten. InputError: it is so
        already, or never was.
        """
        recording = self._current()
        if recording is None or recording.number != number:
            raise InputError(
                f"recording {number} does not run: it is over, or nobody took from it for "
                f"{LEASE_S:.0f} s",
                field="recording_id",
            )
        recording.taken_s = self._clock()
        if stop:
            recording.is_stopped = True
            recording.num_left_out += len(recording.running)
            recording.running.clear()
        requests = _next_part(recording.ended)
        is_over = not (self._is_open(recording) or recording.running or recording.ended)
        if is_over:
            self._recording = None
        return RecordingPart(
            requests=requests,
            num_running=len(recording.running),
            num_left_out=recording.num_left_out,
            is_over=is_over,
        )

    def note_arrival(self, request: AddRequest) -> None:
        recording = self._current()
        if recording is not None and self._is_open(recording):
            recording.num_noted += 1
            recording.running[request.request_id] = self._clock(), request

    def note_end(self, request_id: str, *, output_tokens: int) -> None:
        """A request has ended, however it did; unknown ones arrived before the recording."""
        recording = self._current()
        if recording is None or request_id not in recording.running:
            return
        arrived_s, request = recording.running.pop(request_id)
        if not output_tokens:
            recording.num_left_out += 1
            return
        recording.ended.append(
            RecordedRequest(
                arrival_s=arrived_s - recording.began_s,
                input_tokens=len(request.prompt_tokens),
                output_tokens=output_tokens,
                max_tokens=request.sampling.max_tokens,
                block_ids=_number_blocks(request.prompt_tokens, recording=recording),
            )
        )

    def _current(self) -> _Recording | None:
        """The recording, unless its reader is gone."""
        recording = self._recording
        if recording is not None and self._clock() - recording.taken_s > LEASE_S:
            recording = self._recording = None
        return recording

    def _is_open(self, recording: _Recording) -> bool:
        """Whether it notes arrivals."""
        is_full = recording.num_noted == recording.max_requests
        is_late = recording.ends_s is not None and self._clock() >= recording.ends_s
        return not (recording.is_stopped or is_full or is_late)


def _number_blocks(tokens: tuple[int, ...], *, recording: _Recording) -> tuple[int, ...]:
    """Of each block, the last one perhaps not full, together with all before it."""
    chain, numbers = b"", recording.block_numbers
    found = []
    for begin in range(0, len(tokens), BLOCK_TOKENS):
        content = array("q", tokens[begin : begin + BLOCK_TOKENS]).tobytes()
        chain = blake2b(chain + content, key=recording.key, digest_size=16).digest()
        found.append(numbers.setdefault(chain, len(numbers)))
    return tuple(found)


def _next_part(ended: deque[RecordedRequest]) -> tuple[RecordedRequest, ...]:
    part: list[RecordedRequest] = []
    room = PART_BLOCKS
    while ended and (room > 0 or not part):
        part.append(ended.popleft())
        room -= 1 + len(part[-1].block_ids)
    return tuple(part)
