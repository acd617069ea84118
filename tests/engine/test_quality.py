"""The quality breaker in a real engine: low recall is acted on in the next step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from sparsed.core import AddRequest, EngineSpec, SamplingParams, Service, SparseMethod
from sparsed.engine.breaker import GOOD_SAMPLES
from sparsed.engine.decode import sampled_turn
from sparsed.engine.engine import Engine
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.quality import QualityGuard
from sparsed.engine.request import RequestState
from sparsed.engine.runner import Runner

MakeCache = Callable[..., KVCache]
MakeSpec = Callable[..., EngineSpec]

STRIDE = 8  # steps between two samples
PROMPT = tuple(3 + i * i % 97 for i in range(1800))


def make_engine(make_spec: MakeSpec, *, lane_blocks: int, floor: float) -> Engine:
    spec = make_spec(
        "dummy:tiny", lane_blocks=lane_blocks, page_size=8, token_budget=256, prefill_chunk=2048,
        sparse_method="quest",
    )  # fmt: skip
    spec = replace(spec, recall_stride=STRIDE)
    runner = Runner(spec, on_progress=lambda *_: None)
    return Engine(runner, knobs=spec.knobs, service=Service(recall_floor=floor))


@pytest.mark.parametrize("lane_blocks", [5, 20])
def test_a_request_of_low_recall_reads_more_and_then_all(
    make_spec: MakeSpec, lane_blocks: int
) -> None:
    """With five blocks most of what it reads passes through the staging area."""
    engine = make_engine(make_spec, lane_blocks=lane_blocks, floor=0.9999)
    sampling = SamplingParams(max_tokens=6 * STRIDE, temperature=0.0)
    engine.add(AddRequest(request_id="a", prompt_tokens=PROMPT, sampling=sampling))
    changes: list[tuple[int, int, bool]] = []
    outputs = []
    steps = 0
    while engine.has_work:
        outputs += engine.step().outputs
        steps += 1
        for event in engine.stats().recent_quality:
            assert event.request_id == "a" and event.recall < 0.9999
            changes.append((steps, event.token_budget, event.is_dense))
    assert [change[1:] for change in changes] == [
        (512, False),
        (1024, False),
        (2048, False),
    ], "more than there is: dense"
    seen = [step for step, *_ in changes]
    sampled = [step for step in range(2, 9 * STRIDE) if sampled_turn(step, STRIDE) is not None]
    assert seen == [step + 1 for step in sampled[:3]], "one step after the sample"
    details = outputs[-1].sparse
    assert details is not None and details.method == "quest" and details.token_budget == 2048
    assert details.sparse_steps == sampled[2] - 1, "the first step was that of the prompt"
    stats = engine.stats()
    assert (stats.quality_raises, stats.quality_dense) == (3, 0)
    cache = engine._model.kv
    assert isinstance(cache, KVCache)
    cache.check_integrity()
    assert len(cache.arena.blocks) == cache.arena.blocks.size


def test_dense_is_the_end(make_spec: MakeSpec) -> None:
    engine = make_engine(make_spec, lane_blocks=20, floor=0.9999)
    request = AddRequest(
        request_id="a",
        prompt_tokens=PROMPT,
        sampling=SamplingParams(max_tokens=20, temperature=0.0),
    )
    engine.add(request)
    for _ in range(3):
        engine.step()
    cache = engine._model.kv
    assert isinstance(cache, KVCache)
    (row,) = cache.rows.values()
    sparse_steps = row.reads.sparse_steps
    assert sparse_steps > 0
    cache.set_attention(row.index, token_budget=256, is_dense=True)
    claim = cache.claims.of_row(row.index)
    assert claim.mandatory_pages == 3 * 16 * cache.geometry.num_lanes, "as it was admitted"
    while engine.has_work:
        final = engine.step().outputs
    assert final[-1].error is None and final[-1].sparse is not None
    assert final[-1].sparse.sparse_steps == sparse_steps
    cache.check_integrity()


@pytest.mark.parametrize("num_more", [0, 1])
def test_who_was_raised_and_is_good_again_follows_the_knob(
    make_cache: MakeCache, num_more: int
) -> None:
    """Whether or not there was another good sample since."""
    cache = make_cache(lane_blocks=8, num_frames=20, token_budget=256)
    guard = QualityGuard(cache, floor=0.5)
    prompt = AddRequest(request_id="a", prompt_tokens=(1,), sampling=SamplingParams(max_tokens=900))
    request = RequestState(request=prompt, seed=0)
    request.admit(cache.add(901, method=SparseMethod.CUBOID_MEAN, token_budget=None))
    row = cache.rows[0]
    row.recalls += [0.4]
    guard.look([request], knobs=cache._knobs)
    assert row.token_budget == 512
    row.recalls += [1.0] * (GOOD_SAMPLES + num_more)
    guard.look([request], knobs=cache._knobs)
    assert row.token_budget == 256
    knobs = replace(cache._knobs, token_budget=384)
    cache.apply(knobs)
    guard.apply([request], knobs=knobs)
    assert row.token_budget == 384
