"""Earlier pages of a prompt, in pieces through the staging area."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparsed.core import SparseMethod
from sparsed.engine.cold_context import ColdContext
from sparsed.engine.kvcache.cache import KVCache

MakeCache = Callable[..., KVCache]


@pytest.mark.parametrize("num_pages", [0, 1, 3, 4, 12, 13])
def test_pieces_are_all_pages_in_order(make_cache: MakeCache, num_pages: int) -> None:
    """Each is there while it is asked for, whatever the half holds then."""
    cache = make_cache(lane_blocks=3, num_frames=8, page_size=32, token_budget=256)
    row = cache.add(1000, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    cache.pool.pages_RX.normal_()
    context = ColdContext(
        cache, staging_NX=cache.arena.pages_NX.new_empty((17, cache.arena.pages_NX.shape[1]))
    )
    assert context.piece_tokens == 4 * 32
    for layer in range(2):
        context.foresee(row, layer, num_pages=num_pages)
        found = [part.clone() for part in context.pieces(row, layer, num_pages=num_pages)]
        rows_HP = cache.tables.page_rows(row, 0, num_pages)[layer]
        assert len(found) == -(-num_pages // 4)
        assert sum(part.shape[1] for part in found) == 32 * num_pages
        if found:
            joined = torch.cat(found, dim=1)
            assert torch.equal(joined, cache.pool.pages_RX[rows_HP].view(joined.shape))
