"""Inputs of the kernels of sparse steps, but for those of ``resolve_cases``.

Legend: I inputs in turn, B requests, H KV heads, G query heads per KV head, D head dim, R kept
dims, X pages of all requests, K selected pages, N lanes, M pages, S rows of a store of mean keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from sparsed.core import Ceiling
from sparsed.engine.measure.cases import Case, Setting, permutation
from sparsed.engine.measure.clock import Work
from sparsed.engine.measure.resolve_cases import resolve_cases
from sparsed.engine.measure.sparse_step import SparseStep
from sparsed.engine.sparse.base import SINK_PAGES, recent_pages
from sparsed.kernels.mean_keys import SCALE_BYTES, row_bytes, select_by_mean_keys
from sparsed.kernels.selected import (
    SPLIT_TOKENS,
    Partials,
    Selected,
    attend_hits,
    attend_rest,
    make_partials,
)
from sparsed.kernels.summarise import summarise_pages

FLOAT_BYTES: Final = 4  # of logits and of parts of attention
BYTE_LIMIT: Final = 60  # two bytes below it are a float16 below 1.25: a scale like any other


def sparse_cases(setting: Setting) -> Iterator[Case]:
    """In the order of a step, at the longest context."""
    on_cpu = setting.device.type == "cpu"
    steps = [SparseStep(setting, batch) for batch in setting.batches]
    yield from map(select_case, steps)
    for step in steps:
        yield from resolve_cases(step)
    if not on_cpu:  # there a step attends to all its pages at once
        yield from map(hits_case, steps)
        yield from map(rest_case, steps)
    for step in steps:
        lanes = step.geometry.num_lanes
        yield summarise_case(setting, frames=step.batch, lanes=lanes, frame_pages=1)
    per_frame, heads = steps[0].geometry.pages_per_block, setting.shape.num_kv_heads
    frames = setting.rows[1] // (per_frame * setting.page_size)
    yield summarise_case(setting, frames=frames, lanes=heads, frame_pages=per_frame)


def select_case(step: SparseStep) -> Case:
    """The best pages by their mean keys; every input is another layer of the store."""
    setting, shape, geometry = step.setting, step.setting.shape, step.geometry
    heads, dim, kept = shape.num_kv_heads, shape.head_dim, geometry.stored_dims
    amount = step.num_lanes * step.num_full * (kept // 2 + SCALE_BYTES)
    amount += heads * dim * kept * FLOAT_BYTES

    def make() -> Sequence[Work]:
        layers = setting.rotations(amount)
        frames_RF = permutation(setting, step.batch * step.frames).view(step.batch, -1).int()
        size = (frames_RF.numel() * layers * heads, row_bytes(geometry.pages_per_block, kept))
        store_MY = torch.randint(BYTE_LIMIT, size, device=setting.device, dtype=torch.uint8)
        q_BHGD = setting.random(step.batch, heads, setting.group, dim)
        basis_IHDR = setting.random(layers, heads, dim, kept).float()
        lanes = (step.batch, heads, step.num_selected)
        out_BHK = torch.empty(lanes, device=setting.device, dtype=torch.int32)
        return [
            partial(
                select_by_mean_keys,
                q_BHGD,
                store_MY,
                basis_HDR=basis_IHDR[layer],
                rows_B=step.numbers(),
                frames_RF=frames_RF,
                num_full_B=step.same(step.num_full),
                count_B=step.same(step.num_selected),
                layer=layer,
                num_layers=layers,
                pages_per_frame=geometry.pages_per_block,
                scale=dim**-0.5,
                sink_pages=SINK_PAGES,
                recent_pages=recent_pages(setting.page_size),
                max_pages=geometry.max_pages(step.context),
                out_BHK=out_BHK,
            )
            for layer in range(layers)
        ]

    words = f"{step.batch} x {step.context}, {step.num_selected} of {step.num_full} pages"
    return Case("select_by_mean_keys", words, Ceiling.COPY, amount, make)


def hits_case(step: SparseStep) -> Case:
    """Attention to selected pages, all of them hot."""
    setting, heads, dim = step.setting, step.setting.shape.num_kv_heads, step.setting.shape.head_dim
    pages = step.num_selected
    amount = step.num_lanes * pages * step.geometry.page_bytes + _partial_bytes(step)

    def make() -> Sequence[Work]:
        size = (setting.rotations(amount), step.batch, heads, pages)
        num_pages = size[0] * step.num_lanes * pages
        slots_IBHK = permutation(setting, num_pages).int().view(size)
        arena_NTCD = setting.random(num_pages, setting.page_size, 2, dim)
        q_BHGD = setting.random(step.batch, heads, setting.group, dim)
        return [
            partial(
                attend_hits,
                q_BHGD,
                arena_NTCD,
                selected=(selected := _all_hits(step, slots_BHK, slots_BHK[..., 0])),
                partials=make_partials(selected, q_BHGD, page_size=setting.page_size),
                scale=dim**-0.5,
            )
            for slots_BHK in slots_IBHK
        ]

    words = f"{step.batch} x {pages} pages of {setting.page_size}"
    return Case("attend_hits", words, Ceiling.COPY, amount, make)


def rest_case(step: SparseStep) -> Case:
    """A partial page that is just full, and the parts that ``attend_hits`` leaves, into one."""
    setting, heads, dim = step.setting, step.setting.shape.num_kv_heads, step.setting.shape.head_dim
    rows = step.num_lanes * setting.group
    amount = _partial_bytes(step) + rows * (dim * setting.dtype.itemsize + FLOAT_BYTES)
    amount += step.num_lanes * step.geometry.page_bytes

    def make() -> Sequence[Work]:
        count = setting.rotations(amount)
        out_IBHGD = setting.random(count, step.batch, heads, setting.group, dim)
        lse_IBHG = torch.empty(out_IBHGD.shape[:4], device=setting.device)
        arena_NTCD = setting.random(count * step.num_lanes, setting.page_size, 2, dim)
        tails_IBH = permutation(setting, len(arena_NTCD)).int().view(count, step.batch, heads)
        slots_BHK = tails_IBH.new_zeros((step.batch, heads, step.num_selected))
        return [
            partial(
                attend_rest,
                out_BHGD.clone(),
                arena_NTCD,
                selected=(selected := _all_hits(step, slots_BHK, tails_BH)),
                partials=_random_partials(selected, out_BHGD, page_size=setting.page_size),
                scale=dim**-0.5,
                out_BHGD=out_BHGD,
                lse_BHG=lse_BHG,
            )
            for out_BHGD, lse_BHG, tails_BH in zip(out_IBHGD, lse_IBHG, tails_IBH, strict=True)
        ]

    words = f"{step.batch} x {step.num_selected} hits and a page of {setting.page_size}"
    return Case("attend_rest", words, Ceiling.COPY, amount, make)


def summarise_case(setting: Setting, *, frames: int, lanes: int, frame_pages: int) -> Case:
    """Mean keys of ``frame_pages`` pages of each lane of each frame: one as in a decode step of so
    many requests, all of them as in a prompt chunk. Keys are read, values are not."""
    step = SparseStep(setting, batch=1)
    geometry, dim, page_size = step.geometry, setting.shape.head_dim, setting.page_size
    kept, per_frame = geometry.stored_dims, geometry.pages_per_block
    num_pages = frames * lanes * frame_pages
    amount = num_pages * (geometry.page_bytes // 2 + kept // 2 + SCALE_BYTES)
    amount += lanes * dim * (kept + 1) * FLOAT_BYTES

    def make() -> Sequence[Work]:
        count = setting.rotations(amount)
        pages_IMTCD = setting.random(count, num_pages, page_size, 2, dim)
        basis_INDR = setting.random(count, lanes, dim, kept).float()
        centre_IND = setting.random(count, lanes, dim).float()
        size = (count, frames * lanes, row_bytes(per_frame, kept))
        store_ISY = torch.zeros(size, device=setting.device, dtype=torch.uint8)
        rows_S1 = torch.arange(frames * lanes, device=setting.device)[:, None] * per_frame
        page_rows_M = (rows_S1 + torch.arange(frame_pages, device=setting.device)).flatten()
        return [
            partial(
                summarise_pages,
                pages_MTCD,
                page_rows_M,
                basis_NDR=basis_NDR,
                centre_ND=centre_ND,
                pages_per_frame=per_frame,
                store_SY=store_SY,
            )
            for pages_MTCD, basis_NDR, centre_ND, store_SY in zip(
                pages_IMTCD, basis_INDR, centre_IND, store_ISY, strict=True
            )
        ]

    words = f"{num_pages} pages of {page_size}, {lanes} lanes"
    return Case("summarise_pages", words, Ceiling.COPY, amount, make)


def _partial_bytes(step: SparseStep) -> int:
    """What ``attend_hits`` writes, of each split of the hits."""
    splits = -(-step.num_selected * step.setting.page_size // SPLIT_TOKENS)
    row_bytes_ = (step.setting.shape.head_dim + 1) * FLOAT_BYTES
    return step.num_lanes * splits * step.setting.group * row_bytes_


def _all_hits(step: SparseStep, slots_BHK: Tensor, tail_slots_BH: Tensor) -> Selected:
    return Selected(
        slots_BHK=slots_BHK,
        num_hits_BH=torch.full_like(tail_slots_BH, step.num_selected).contiguous(),
        count_B=step.same(step.num_selected),
        tail_slots_BH=tail_slots_BH.contiguous(),
        tail_tokens_B=step.same(step.setting.page_size),
    )


def _random_partials(selected: Selected, q_BHGD: Tensor, *, page_size: int) -> Partials:
    partials = make_partials(selected, q_BHGD, page_size=page_size)
    return Partials(*(part.normal_() for part in partials))
