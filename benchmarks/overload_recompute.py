"""Dense serving as engines without a second tier do it: hot memory is given out as tokens come, and
who does not fit any more loses it and computes all of it again. Only for measurements."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

from sparsed.core import AddRequest, FinishReason
from sparsed.core import TokenOutput as Output
from sparsed.engine.engine import Engine
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.kvcache.shares import Shares

AHEAD_TOKENS = 2  # of a step that runs and of the next one


class Recomputing:
    """Keeps the queue of an engine whose blocks are given out ``on_demand``: ``lane_blocks`` of them
    in a lane. A request is handed over once the blocks of its prompt are free; when those that run
    need more than there is, the newest is aborted, and comes back before all that wait, as a
    prompt of all its tokens so far. (Its tokens as ``generated_tokens`` would be decoded again one
    by one: this is faster.)"""

    def __init__(self, engine: Engine, *, lane_blocks: int) -> None:
        self.num_preempted = 0
        self._engine = engine
        self._lane_blocks = lane_blocks
        self._waiting: deque[AddRequest] = deque()
        self._running: dict[str, AddRequest] = {}  # the newest last
        self._tokens: dict[str, list[int]] = {}  # of those, since they were handed over

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running) or self._engine.has_work

    def add(self, request: AddRequest) -> None:
        self._waiting.append(request)

    def settle(self) -> None:
        """Preempt, then hand over what fits."""
        while len(self._running) > 1 and self._used > self._lane_blocks:
            self._preempt()
        while self._waiting:
            need = _blocks(self._waiting[0], 0)
            if self._running and self._used + need > self._lane_blocks:
                return
            request = self._waiting.popleft()
            self._running[request.request_id] = request
            self._tokens[request.request_id] = []
            self._engine.add(request)

    def note(self, output: Output) -> bool:
        """Not of a request that was aborted here; the token it had in flight is drawn again."""
        if output.request_id not in self._running or output.finish_reason is FinishReason.ABORT:
            return False
        if output.token_id is not None:
            self._tokens[output.request_id].append(output.token_id)
        if output.finish_reason is not None:
            del self._running[output.request_id]
        return True

    @property
    def _used(self) -> int:
        """Blocks of a lane after the next step."""
        return sum(
            _blocks(request, len(self._tokens[name])) for name, request in self._running.items()
        )

    def _preempt(self) -> None:
        name, request = self._running.popitem()
        self._engine.abort(name)
        tokens = self._tokens[name]
        sampling = request.sampling
        left = replace(sampling, max_tokens=sampling.max_tokens - len(tokens))
        prompt = (*request.prompt_tokens, *tokens)
        self._waiting.appendleft(replace(request, prompt_tokens=prompt, sampling=left))
        self.num_preempted += 1


def _blocks(request: AddRequest, num_generated: int) -> int:
    """Of a lane, when the next step is done."""
    num_prompt = len(request.prompt_tokens)
    most = num_prompt + request.sampling.max_tokens
    return num_frames(min(num_prompt + num_generated + AHEAD_TOKENS, most))


def on_demand(shares: Shares) -> AbstractContextManager[object]:
    """Meanwhile a request is admitted with one block a lane and takes more as it fills them; nothing
    is taken back. Patched: the baseline's rules, which an engine with a second tier never has."""
    return patch.multiple(
        shares,
        mandatory=lambda *_sizes, **_options: 1,
        quota=shares.most,
        reclaimable=lambda: 0,
    )
