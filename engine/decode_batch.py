"""Decode rows of a step, collected into batches that are attended to together.

Shape legend: L layers, B requests of a batch, H KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsed.core import SparseMethod
from sparsed.engine.batch import DecodeRow
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.row import Row
from sparsed.engine.kvcache.upload import upload

PADDING_FRAC = 0.25  # most padding a group of unequal lengths may carry


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Decode rows that are attended to together. ``index_B`` is their place in the step."""

    rows: tuple[Row, ...]
    index_B: Tensor
    rows_B: Tensor
    num_full: tuple[int, ...]  # full pages before the page of the current token
    num_full_B: Tensor
    tail_tokens_B: Tensor  # tokens of that page, the current one included
    tail_slots_LBH: Tensor


def one_row(batch: Batch, b: int) -> Batch:
    """The batch of its b-th request alone."""
    only = slice(b, b + 1)
    return Batch(
        rows=batch.rows[only],
        index_B=batch.index_B[only],
        rows_B=batch.rows_B[only],
        num_full=batch.num_full[only],
        num_full_B=batch.num_full_B[only],
        tail_tokens_B=batch.tail_tokens_B[only],
        tail_slots_LBH=batch.tail_slots_LBH[:, only],
    )


def make_batch(cache: KVCache, decodes: Sequence[DecodeRow], index: Sequence[int]) -> Batch:
    """Collect decode rows ``index`` of a step; their pages must be open."""
    device, page_size = cache.arena.pages_NX.device, cache.geometry.page_size
    chosen = [decodes[i] for i in index]
    num_full = tuple(decode.position // page_size for decode in chosen)
    rows_B = upload([decode.row for decode in chosen], device=device)
    num_full_B = upload(num_full, device=device)
    tail = [decode.position % page_size + 1 for decode in chosen]
    return Batch(
        rows=tuple(cache.rows[decode.row] for decode in chosen),
        index_B=upload(index, device=device),
        rows_B=rows_B,
        num_full=num_full,
        num_full_B=num_full_B,
        tail_tokens_B=upload(tail, device=device).int(),
        tail_slots_LBH=cache.tables.slots_at(rows_B, num_full_B),
    )


def is_sparse(row: Row, position: int, page_size: int) -> bool:
    """Whether the token at ``position`` attends to a selection: more pages than the budget."""
    return row.method != SparseMethod.DENSE and (
        position // page_size > row.selected_pages(page_size)
    )


def similar_lengths(decodes: Sequence[DecodeRow], index: list[int]) -> list[list[int]]:
    """Cut ``index``, ordered by length, so that no group pads more than PADDING_FRAC."""
    groups: list[list[int]] = []
    for i in sorted(index, key=lambda i: decodes[i].position):
        longest = (1 + PADDING_FRAC) * (decodes[groups[-1][0]].position + 64) if groups else -1
        if decodes[i].position <= longest:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
