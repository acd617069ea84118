"""What the simulator says a hot tier misses is what the engine's own tables and slots miss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sparsed.core import CachePolicy, SparseMethod
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.residency import Residency
from sparsed.engine.sim.replay import replay
from sparsed.engine.sim.trace import Ints, make_trace

MakeCache = Callable[..., KVCache]
PAGE, NUM_PAGES, NUM_SELECTED = 8, 124, 31  # of 1,000 tokens, with a token budget of 256
STEPS, SKIPPED, LANES = 300, 32, 4
MOST_APART = 0.002  # of the selected pages


def drifting(seed: int) -> Ints:
    """Selections (S, L, K): scores of pages change a little from step to step."""
    rng = np.random.default_rng(seed)
    scores_LP = rng.standard_normal((LANES, NUM_PAGES))
    steps = []
    for _ in range(STEPS):
        scores_LP = 0.97 * scores_LP + 0.2 * rng.standard_normal(scores_LP.shape)
        steps.append(np.argsort(-scores_LP, axis=1)[:, :NUM_SELECTED])
    return np.sort(np.array(steps), axis=2)


def engine_misses(cache: KVCache, pages_SLK: Ints) -> list[int]:
    """Pages of all lanes that each step misses, of a request whose tier was filled by a prompt."""
    index = cache.add(1020, method=SparseMethod.CUBOID_MEAN, token_budget=None)
    length = NUM_PAGES * PAGE + 1
    cache.open_chunk(index, 0, length, step=1)
    assert not cache.rows[index].complete
    residency, missed = Residency(cache), []
    for step, pages_LK in enumerate(pages_SLK, start=2):
        residency.begin(step)
        before = residency.counters.read()[1]
        for layer, pages_HK in enumerate(pages_LK.reshape(2, 2, NUM_SELECTED)):
            residency.bring_in(
                torch.from_numpy(pages_HK[None]).int(),
                layer=layer,
                rows_B=torch.tensor([index], dtype=torch.int32),
                positions_B=torch.tensor([length - 1], dtype=torch.int32),
                max_blocks=cache.rows[index].blocks.most,
            )
        missed.append(residency.counters.read()[1] - before)
    return missed


@pytest.mark.parametrize("lane_blocks", [3, 4, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_simulated_tier_misses_what_the_engines_does(
    make_cache: MakeCache, lane_blocks: int, seed: int
) -> None:
    pages_SLK = drifting(seed)
    cache = make_cache(
        lane_blocks=lane_blocks, num_frames=9, page_size=PAGE, token_budget=256,
        residency_watermark=0.0,
    )  # fmt: skip
    missed = np.array(engine_misses(cache, pages_SLK))
    slots = lane_blocks * cache.geometry.pages_per_block - 1  # the partial page has one
    loads = replay(make_trace(pages_SLK), CachePolicy.BUCKETED, capacity_L=np.full(LANES, slots))
    selected = (STEPS - SKIPPED) * LANES * NUM_SELECTED
    simulated = loads.missed_S[SKIPPED:].sum() / selected
    measured = missed[SKIPPED:].sum() / selected
    assert measured > 5 * MOST_APART, "or there is nothing to agree on"
    assert abs(simulated - measured) <= MOST_APART
