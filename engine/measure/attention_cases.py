"""Inputs of attention, at the sizes of a model: over whole contexts, over selections, of prompts.

Legend: B requests, L layers (rotated), H KV heads, G query heads per KV head, D head dim, K pages
of a selection, F frames, X pages of a frame, E = 2 * D, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from sparsed.core import BLOCK_TOKENS, Ceiling
from sparsed.engine.measure.cases import Case, Setting, permutation
from sparsed.engine.measure.clock import Work
from sparsed.engine.step_decoder import attention_programs
from sparsed.engine.step_input import cut_items
from sparsed.kernels.attend import attend_pages
from sparsed.kernels.dense import Backend, attend_dense
from sparsed.kernels.merge import merge_states
from sparsed.kernels.resident import ResidentPlan, attend_resident
from sparsed.kernels.score import score_pages

BUDGET_TOKENS: Final = 2048  # of a selection
TILES: Final = {"cpu": (512,), "cuda": (2048, 8192)}  # tokens of a prompt chunk


def attention_cases(setting: Setting) -> Iterator[Case]:
    on_cpu = setting.device.type == "cpu"
    sizes = [(batch, context) for context in setting.contexts for batch in setting.batches]
    if not on_cpu:  # there every step goes through selections
        for batch, context in sizes:
            yield resident_case(setting, batch=batch, context=context)
    for batch in setting.batches:
        yield pages_case(setting, batch=batch)
    for batch, context in sizes:
        yield score_case(setting, batch=batch, context=context)
    for tokens in TILES[setting.device.type]:
        for backend in (Backend.FLASH,) if on_cpu else Backend:
            yield prompt_case(setting, tokens=tokens, backend=backend)
        yield merge_case(setting, tokens=tokens)


def resident_case(setting: Setting, *, batch: int, context: int) -> Case:
    """Decode attention over whole contexts; every layer of the page table is other blocks."""
    heads, dim = setting.shape.num_kv_heads, setting.shape.head_dim
    amount = batch * heads * context * 2 * dim * setting.dtype.itemsize

    def make() -> Sequence[Work]:
        layers, per_block = setting.rotations(amount), BLOCK_TOKENS // setting.page_size
        frames_RF = permutation(setting, batch * -(-context // BLOCK_TOKENS)).view(batch, -1).int()
        shape = (frames_RF.numel(), layers, heads)
        blocks = permutation(setting, int(np.prod(shape))).view(shape)
        pages = torch.arange(per_block, device=setting.device)
        page_slot_MLHP = (blocks[..., None] * per_block + pages).int()
        arena_NTCD = setting.random(blocks.numel() * per_block, setting.page_size, 2, dim)
        q_NHD = setting.random(batch, heads * setting.group, dim)
        plan = resident_plan([context] * batch, device=setting.device)
        programs = attention_programs(setting.device, num_heads=heads)
        return [
            partial(
                attend_resident,
                q_NHD,
                arena_NTCD,
                frames_RF=frames_RF,
                page_slot_MLHP=page_slot_MLHP,
                layer=layer,
                plan=plan,
                scale=dim**-0.5,
                programs=programs,
            )
            for layer in range(layers)
        ]

    return Case("attend_resident", f"{batch} x {context}", Ceiling.COPY, amount, make)


def resident_plan(lengths: Sequence[int], *, device: torch.device) -> ResidentPlan:
    """Request b in row b, cut as the engine cuts it."""
    lengths_B = np.array(lengths, dtype=np.int32)
    first_B, items_I3 = cut_items(lengths_B)
    rows_B, count = np.arange(len(lengths), dtype=np.int32), np.array([len(items_I3)], np.int32)
    parts = (rows_B, lengths_B, items_I3, first_B, count)
    return ResidentPlan(*(torch.from_numpy(part).to(device) for part in parts))


def pages_case(setting: Setting, *, batch: int) -> Case:
    """Decode attention over a selection of pages that lie anywhere."""
    heads, dim, page_size = setting.shape.num_kv_heads, setting.shape.head_dim, setting.page_size
    columns = BUDGET_TOKENS // page_size
    amount = batch * heads * columns * page_size * 2 * dim * setting.dtype.itemsize

    def make() -> Sequence[Work]:
        shape = (setting.rotations(amount), batch, heads, columns)
        slots_IBHK = permutation(setting, int(np.prod(shape))).int().view(shape)
        arena_NTCD = setting.random(slots_IBHK.numel(), page_size, 2, dim)
        q_BHGD = setting.random(batch, heads, setting.group, dim)
        tail_B = torch.full((batch,), page_size, device=setting.device, dtype=torch.int32)
        return [
            partial(
                attend_pages,
                q_BHGD,
                arena_NTCD,
                slots_BHK=slots_BHK,
                tail_tokens_B=tail_B,
                scale=dim**-0.5,
            )
            for slots_BHK in slots_IBHK
        ]

    words = f"{batch} x {columns} pages of {page_size}"
    return Case("attend_pages", words, Ceiling.COPY, amount, make)


def score_case(setting: Setting, *, batch: int, context: int) -> Case:
    """Scores of all pages of the contexts."""
    heads, width = setting.shape.num_kv_heads, 2 * setting.shape.head_dim
    frames, frame_pages = -(-context // BLOCK_TOKENS), BLOCK_TOKENS // setting.page_size
    num_pages = batch * heads * frames * frame_pages
    amount = num_pages * (width * setting.dtype.itemsize + 4) + batch * heads * frames * 8

    def make() -> Sequence[Work]:
        shape = (setting.rotations(amount), batch, heads, frames)
        rows_IBHF = permutation(setting, int(np.prod(shape))).view(shape)
        summaries_FXE = setting.random(rows_IBHF.numel(), frame_pages, width)
        query_BHE = setting.random(batch, heads, width)
        return [
            partial(score_pages, query_BHE, summaries_FXE, rows_BHF=rows_BHF)
            for rows_BHF in rows_IBHF
        ]

    return Case("score_pages", f"{batch} x {context}", Ceiling.COPY, amount, make)


def prompt_case(setting: Setting, *, tokens: int, backend: Backend) -> Case:
    """Causal attention of a prompt chunk over itself; FLOP of the half that counts."""
    shape = setting.shape
    amount = 2.0 * shape.num_heads * shape.head_dim * tokens * (tokens + 1)
    num_bytes = 2 * tokens * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    num_bytes *= setting.dtype.itemsize

    def make() -> Sequence[Work]:
        inputs = [_chunk(setting, tokens) for _ in range(setting.rotations(num_bytes))]
        works = [
            partial(attend_dense, *qkv, causal=True, scale=shape.head_dim**-0.5, backend=backend)
            for qkv in inputs
        ]
        try:
            works[0]()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # this device, dtype or shape is not supported
            return ()
        return works

    words = f"{tokens}, {backend}"
    return Case("attend_dense", words, Ceiling.MATMUL, amount, make, capture=False)


def _chunk(setting: Setting, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (H, G, n, D), k and v (H, n, D), with the strides that the engine gives them."""
    heads, dim = setting.shape.num_kv_heads, setting.shape.head_dim
    q_nHGD = setting.random(tokens, heads, setting.group, dim)
    k_HnD, v_HnD = (setting.random(tokens, heads, dim).transpose(0, 1) for _ in range(2))
    return q_nHGD.permute(1, 2, 0, 3), k_HnD, v_HnD


def merge_case(setting: Setting, *, tokens: int) -> Case:
    """Two states of a prompt chunk into a third."""
    shape = (setting.shape.num_kv_heads, setting.group, tokens, setting.shape.head_dim)
    num_rows = shape[0] * shape[1] * tokens
    amount = 3 * num_rows * (shape[3] * setting.dtype.itemsize + 4)

    def make() -> Sequence[Work]:
        count = setting.rotations(amount)
        o_IHGnD = setting.random(count, 3, *shape)
        lse_IHGn = torch.empty((count, 2, *shape[:3]), device=setting.device).normal_()
        return [
            partial(merge_states, o[0], lse[0], o[1], lse[1], out=o[2])
            for o, lse in zip(o_IHGnD, lse_IHGn, strict=True)
        ]

    return Case("merge_states", f"{num_rows} x {shape[3]}", Ceiling.COPY, amount, make)
