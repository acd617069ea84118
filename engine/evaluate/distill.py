"""Learns the gates of a layer from its true attention.

Shape legend: N positions, n positions of a batch, H KV heads, G query heads per KV head, D head
dim, M tokens, U units, E = 3 D pooled values, R dims of the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from sparsed.engine.sparse.gate import map_queries, pool
from sparsed.engine.sparse.summaries import dot

UNIT_TOKENS: Final = 16
STEPS: Final = 300
BATCH_POSITIONS: Final = 64
LEARNING_RATE: Final = 1e-3


class Lesson(NamedTuple):
    """One text at one layer: queries (N, H, G, D) of positions ``first`` and on, and all keys
    (H, M, D) up to the last of them, float32, M a multiple of a unit."""

    q_NHGD: Tensor
    keys_HMD: Tensor
    first: int


def distill_gate(
    lessons: Sequence[Lesson], *, start_keys_HER: Tensor, start_queries_HGDR: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Maps of keys and queries, as ``Gate`` takes them, after ``STEPS`` steps of Adam from the
    start: cross entropy between the true attention of each query head to full units and what the
    gate expects. On the device of the lessons."""
    maps = [x.clone().requires_grad_() for x in (start_keys_HER, start_queries_HGDR)]
    optimizer = torch.optim.Adam(maps, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=STEPS, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(0)
    pooled = [_pool(lesson) for lesson in lessons]
    with torch.enable_grad():
        for step in range(STEPS):
            which = step % len(lessons)
            lesson = lessons[which]
            picked_n = torch.randint(len(lesson.q_NHGD), (BATCH_POSITIONS,), generator=generator)
            loss = _loss(lesson, pooled[which], maps, picked_n.to(lesson.q_NHGD.device), scale)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            schedule.step()
    keys_HER, queries_HGDR = (x.detach() for x in maps)
    return keys_HER, queries_HGDR


def start_maps(
    basis_keys_HDR: Tensor, basis_queries_HDR: Tensor, *, group: int
) -> tuple[Tensor, Tensor]:
    """Maps that make a gate of the mean key in a basis: where learning begins."""
    zeros = torch.zeros_like(basis_keys_HDR)
    keys_HER = torch.cat((basis_keys_HDR, zeros, zeros), dim=1)
    return keys_HER, basis_queries_HDR[:, None].repeat(1, group, 1, 1)


def _pool(lesson: Lesson) -> Tensor:
    """Pooled keys of every unit, less their mean over the text before ``first``."""
    centred_HMD = lesson.keys_HMD - lesson.keys_HMD[:, : lesson.first].mean(1, keepdim=True)
    return pool(torch.unflatten(centred_HMD, 1, (-1, UNIT_TOKENS)))


def _loss(
    lesson: Lesson, pooled_HUE: Tensor, maps: Sequence[Tensor], picked_n: Tensor, scale: float
) -> Tensor:
    q_nHGD = lesson.q_NHGD[picked_n]
    num_full_n = (lesson.first + picked_n) // UNIT_TOKENS
    units_U = torch.arange(pooled_HUE.shape[1], device=picked_n.device)
    absent_nU = (units_U == 0) | (units_U >= num_full_n[:, None] - 1)  # always read: not ranked
    absent_n11U = absent_nU[:, None, None]
    with torch.no_grad():
        logits_nHGM = dot(q_nHGD, lesson.keys_HMD) * scale
        target_nHGU = torch.unflatten(logits_nHGM, -1, (-1, UNIT_TOKENS)).logsumexp(-1)
        target_nHGU = torch.softmax(target_nHGU.masked_fill_(absent_n11U, float("-inf")), -1)
    keys_HER, queries_HGDR = maps
    expected_nHGU = dot(map_queries(q_nHGD, queries_HGDR), pooled_HUE @ keys_HER) * scale
    log_share_nHGU = expected_nHGU.masked_fill(absent_n11U, -1e30).log_softmax(-1)
    return -(target_nHGU * log_share_nHGU.clamp(min=-1e4)).sum(-1).mean()
