"""How tokens are drawn, on its way to the device: from a step's plan to the words a kernel reads."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsed.engine.batch import DrawParams, StepPlan
from sparsed.kernels.sample import DrawPlan, draw_tokens

_WORDS = struct.Struct("<QQifffi")  # two halves of the seed, then the other fields in order
_MOST_LIKELY = bytes(_WORDS.size)  # temperature 0
_HALF = (1 << 64) - 1
DRAW_WORDS = _WORDS.size // 4  # int32 words of a draw


def pack_draws(draws: Sequence[DrawParams | None]) -> npt.NDArray[np.int32]:
    """The words of each draw, (DRAW_WORDS, len(draws)); None: the most likely token."""
    packed = b"".join(
        _WORDS.pack(draw.seed & _HALF, draw.seed >> 64 & _HALF, *draw[1:]) if draw else _MOST_LIKELY
        for draw in draws
    )
    return np.frombuffer(packed, dtype=np.int32).reshape(-1, DRAW_WORDS).T


def draw_plan(words: Tensor) -> DrawPlan:
    """Views of what ``pack_draws`` made; each row of ``words`` is contiguous."""
    index, temperature, top_p, min_p, top_k = words[4:]
    temperature, top_p, min_p = (row.view(torch.float32) for row in (temperature, top_p, min_p))
    return DrawPlan(words[:4], index, temperature, top_p, min_p, top_k)


def draw(logits_NV: Tensor, *, draws: Sequence[DrawParams | None]) -> Tensor:
    """The tokens (N,) of these rows, queued and not awaited."""
    words = torch.from_numpy(np.array(pack_draws(draws), order="C"))
    if logits_NV.is_cuda:
        words = words.pin_memory().to(logits_NV.device, non_blocking=True)
    return draw_tokens(logits_NV, plan=draw_plan(words))


def draw_step(logits_NV: Tensor, *, plan: StepPlan) -> Tensor:
    """A token for every row of a step's logits; on the CPU, where the engine draws the others
    itself, the most likely one."""
    if not logits_NV.is_cuda:
        return logits_NV.argmax(dim=-1)
    return draw(logits_NV, draws=list(_draws(plan)))


def _draws(plan: StepPlan) -> Iterator[DrawParams | None]:
    """How each row of a step's logits is drawn; rows inside a prompt are not."""
    for chunk in plan.chunks:
        draws: list[DrawParams | None] = [None] * max(0, chunk.end - chunk.logits_from)
        if draws and chunk.end == chunk.prompt_length:
            draws[-1] = chunk.draw
        yield from draws
    for decode in plan.decodes:
        yield decode.draw
