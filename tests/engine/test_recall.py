"""Recall of queued steps, against what the eager way measures of the same steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sparsed.core import EngineSpec, SparseMethod
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.decode import sampled_layer, sampled_turn
from sparsed.engine.recall import RecallSampler, sampled_place
from sparsed.engine.runner import Runner
from sparsed.engine.step_decoder import StepDecoder

MakeSpec = Callable[..., EngineSpec]
MakeSteps = Callable[..., StepDecoder]

PROMPTS = (
    tuple(i * i % 199 for i in range(700)),
    tuple(range(40)),
    (5, 6) * 350,
    tuple(range(250)),
)
METHODS = (
    SparseMethod.MEAN_KEY,
    SparseMethod.DENSE,
    SparseMethod.MEAN_KEY,
    SparseMethod.MEAN_KEY,
)
FIRST_SPARSE = {0: 0, 1: 10**6, 2: 0, 3: 256 - 250}  # step from which a row selects


def prefilled(spec: EngineSpec) -> Runner:
    runner = Runner(spec, on_progress=lambda *_: None)
    for tokens, method in zip(PROMPTS, METHODS, strict=True):
        row = runner.kv.add(len(tokens) + 64, method=method, token_budget=None)
        chunk = PromptChunk(
            row=row,
            tokens=tokens,
            start=0,
            prompt_length=len(tokens),
            logits_from=len(tokens) - 1,
        )
        runner.run(StepPlan(chunks=(chunk,), decodes=()))
    return runner


def decodes_of(runner: Runner, step: int) -> list[DecodeRow]:
    return [
        DecodeRow(row=row, token=(step + b) % 64, position=len(PROMPTS[b]) + step)
        for b, row in enumerate(sorted(runner.kv.rows))
    ]


@pytest.mark.parametrize(
    ("stride", "hot_blocks", "looks_ahead"),
    [(1, 11, False), (1, 11, True), (1, 40, False), (3, 11, False)],
)
@pytest.mark.parametrize("page_size", [8, 32])
def test_a_queued_step_has_the_recall_of_an_eager_one(
    make_spec: MakeSpec,
    make_steps: MakeSteps,
    page_size: int,
    stride: int,
    hot_blocks: int,
    looks_ahead: bool,
) -> None:
    """Pages cold or hot, ends of pages, dense rows beside it: each sample is that of the step, of
    one sparse row, and changes nothing."""
    asked = {"page_size": page_size, "token_budget": 256, "lane_blocks": hot_blocks}
    spec = make_spec(**asked)
    one, other = prefilled(replace(spec, recall_stride=1)), prefilled(spec)
    other.attention.tiers.recall_stride = stride
    steps, sampler = (
        make_steps(other, looks_ahead=looks_ahead),
        RecallSampler(other.attention.tiers),
    )
    rows, sampled, num_compared = sorted(one.kv.rows), 0, 0
    num_layers = one.kv.geometry.num_layers
    for turn in range(40):
        step = len(PROMPTS) + 1 + turn  # as the runner counts them
        decodes = decodes_of(one, turn)
        expected = one.run(StepPlan(chunks=(), decodes=tuple(decodes)))
        for decode in decodes:
            other.kv.make_room(decode.row, decode.position)
        queued = [found for found in map(steps.row_of, decodes) if found is not None]
        assert len(queued) == len(decodes)
        got = steps.run(queued, step=step)
        torch.testing.assert_close(got.logits_NV, expected.logits_NV, atol=1e-4, rtol=1e-4)
        before = {row: len(other.kv.rows[row].recalls) for row in rows}
        sampler.sample(queued, steps.trail, step=step)
        assert other.attention.counts.recall_samples == sampled, "read by a later step"
        sampler.collect()
        after = {row: len(other.kv.rows[row].recalls) for row in rows}
        found = [row for row in rows if after[row] > before[row]]
        assert len(found) == (sampled_turn(step, stride) is not None)
        for row in found:
            sampled += 1
            assert turn >= FIRST_SPARSE[rows.index(row)]
            recall, turn_of = other.kv.rows[row].recalls[-1], sampled_turn(step, stride)
            assert turn_of is not None and 0 < recall < 0.9999
            if sampled_layer(turn_of, num_layers) == sampled_layer(step, num_layers):
                num_compared += 1
                assert recall == pytest.approx(one.kv.rows[row].recalls[-1], abs=1e-4)
    assert num_compared > 3
    counts = other.attention.counts
    assert sampled == counts.recall_samples > 0
    mine = [recall for row in rows for recall in other.kv.rows[row].recalls]
    assert counts.recall_sum == pytest.approx(sum(mine))
    other.kv.check_integrity()


def test_a_request_that_ends_still_counts(make_spec: MakeSpec, make_steps: MakeSteps) -> None:
    runner = prefilled(replace(make_spec(page_size=8, token_budget=256), recall_stride=1))
    steps, sampler = make_steps(runner), RecallSampler(runner.attention.tiers)
    decodes = decodes_of(runner, 0)[:1]
    queued = [found for found in map(steps.row_of, decodes) if found is not None]
    steps.run(queued, step=9)
    sampler.sample(queued, steps.trail, step=9)
    runner.kv.free(decodes[0].row)
    sampler.collect()
    assert runner.stats().recall_samples == 1


def test_a_runner_tells_what_was_sampled(make_spec: MakeSpec, make_steps: MakeSteps) -> None:
    """The runner samples its queued steps, and its eager ones as before."""
    runner = prefilled(replace(make_spec(page_size=8, token_budget=256), recall_stride=2))
    runner.steps = make_steps(runner)
    for turn in range(6):  # several rows are sparse: of queued steps one is sampled
        runner.run(StepPlan(chunks=(), decodes=tuple(decodes_of(runner, turn))))
    steps = range(len(PROMPTS) + 1, len(PROMPTS) + 7)
    num = sum(sampled_turn(step, 2) is not None for step in steps)
    assert runner.stats().recall_samples == num > 1
    assert sum(len(row.recalls) for row in runner.kv.rows.values()) == num


@pytest.mark.parametrize("queued", [False, True])
def test_with_the_profiler_off_nothing_is_sampled_or_timed(
    make_spec: MakeSpec, make_steps: MakeSteps, queued: bool
) -> None:
    spec = make_spec(page_size=8, token_budget=256, lane_blocks=11)
    runner = prefilled(replace(spec, recall_stride=1))
    runner.steps = make_steps(runner) if queued else None
    told = []
    for turns, word in ((range(3), "off"), (range(3, 6), "on"), (range(6, 9), "off")):
        runner.apply(replace(spec.knobs, profiler=word))
        for turn in turns:
            runner.run(StepPlan(chunks=(), decodes=tuple(decodes_of(runner, turn))))
        stats = runner.stats()
        told.append((stats.recall_samples, stats.timed_steps))
    assert told[0] == (0, 0)
    assert told[1][0] > 0 and told[1][1] == 3
    assert told[2] == told[1]


def test_the_warm_up_reads_what_a_sample_would_and_counts_no_recall(make_spec: MakeSpec) -> None:
    runner = prefilled(make_spec(page_size=8, token_budget=256))
    before, row = runner.stats(), min(runner.kv.rows)
    decode = DecodeRow(row=row, token=0, position=len(PROMPTS[0]) - 1)
    runner.recall.warm_up(decode, num_query_heads=runner.decoder.config.num_heads)
    after, geometry = runner.stats(), runner.kv.geometry
    num_pages = decode.position // 8 * geometry.num_kv_heads
    assert after.h2d_bytes - before.h2d_bytes == num_pages * geometry.page_bytes
    assert after.recall_samples == 0


@pytest.mark.parametrize(("num_rows", "num_layers"), [(1, 1), (3, 35), (8, 32), (32, 32), (33, 32)])
def test_every_request_is_sampled_in_every_layer(num_rows: int, num_layers: int) -> None:
    """Also where there are as many requests as layers, or one more."""
    turns = range(15 * num_rows * num_layers)
    places = [sampled_place(turn, num_rows) for turn in turns]
    layers = [sampled_layer(turn, num_layers) for turn in range(num_layers)]
    pairs = {(place, layers[turn % num_layers]) for turn, place in zip(turns, places, strict=True)}
    assert len(pairs) == num_rows * num_layers
    assert max(places) < num_rows


@pytest.mark.parametrize("stride", [32, 64, 256])
@pytest.mark.parametrize("page_size", [8, 32])
def test_samples_fall_on_all_places_of_a_page_in_every_layer(stride: int, page_size: int) -> None:
    """One a stride; and no layer is seen at some places alone, as it was at every 32nd step."""
    turns = [(sampled_turn(step, stride), step) for step in range(600 * stride)]
    found = [(turn, step) for turn, step in turns if turn is not None]
    assert [turn for turn, _ in found] == [*range(600)]
    seen = Counter((sampled_layer(turn, 4), step % page_size) for turn, step in found)
    assert len(seen) > 0.95 * 4 * page_size
    assert max(seen.values()) < 6 * 600 / (4 * page_size)
