"""Which tokens attend to the pages of an earlier ranking, and to which pages those do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsed.core import SparseMethod
from sparsed.engine.batch import DecodeRow, StepPlan
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.runner import Runner

MakeCache = Callable[..., KVCache]
MakeRunner = Callable[..., Runner]
Prefill = Callable[..., int]

PAGE_SIZE = 8
PROMPT = [i * i % 199 for i in range(701)]


@given(
    stride=st.integers(1, 16),
    start=st.integers(0, 100),
    jumps=st.lists(st.integers(1, 3), max_size=40),
    budgets=st.lists(st.sampled_from([256, 512]), min_size=40, max_size=40),
)
def test_a_ranking_serves_fewer_tokens_than_the_stride_on_its_page(
    make_cache: MakeCache, stride: int, start: int, jumps: list[int], budgets: list[int]
) -> None:
    """``jumps`` above 1: tokens that attended to everything in between."""
    cache = make_cache(lane_blocks=8, num_frames=32, page_size=PAGE_SIZE, retrieval_stride=stride)
    row = cache.rows[cache.add(900, method=SparseMethod.MEAN_KEY, token_budget=None)]
    position, ranked = start, None
    for jump, budget in zip([0, *jumps], budgets, strict=False):
        position += jump
        row.token_budget = budget
        expected = (
            ranked is not None
            and ranked[0] // PAGE_SIZE == position // PAGE_SIZE
            and position < ranked[0] + stride
            and ranked[1] == budget
        )
        assert cache.kept.serves(row, position) == expected
        if not expected:
            cache.kept.note(row, position)
            ranked = (position, budget)


def selections(runner: Runner, row: int, num_tokens: int) -> list[Tensor]:
    """Pages (L, H, K) that each of so many tokens attends to."""
    found, residency = [], runner.attention.tiers.residency
    bring_in = residency.bring_in

    def spy(pages_BHK: Tensor, **values: Any) -> Any:
        layers.append(pages_BHK[0].clone())
        return bring_in(pages_BHK, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residency, "bring_in", spy)
        for step in range(num_tokens):
            layers: list[Tensor] = []
            decode = DecodeRow(row=row, token=step, position=len(PROMPT) + step)
            runner.run(StepPlan(chunks=(), decodes=(decode,)))
            found.append(torch.stack(layers))
    return found


@pytest.mark.parametrize("stride", [1, 3, 16])
def test_tokens_within_a_stride_attend_to_the_pages_of_the_first(
    make_runner: MakeRunner, prefill: Prefill, stride: int
) -> None:
    runner = make_runner(
        page_size=PAGE_SIZE, token_budget=256, lane_blocks=11, retrieval_stride=stride
    )
    chosen = selections(runner, prefill(runner, PROMPT), 40)
    ranked_at = len(PROMPT)
    num_changed = 0
    for step in range(1, 40):
        position = len(PROMPT) + step
        if position % PAGE_SIZE and position - ranked_at < stride:
            assert torch.equal(chosen[step], chosen[step - 1])
        else:
            num_changed += not torch.equal(chosen[step], chosen[step - 1])
            ranked_at = position
    assert num_changed > 3


def test_a_change_of_stride_holds_from_the_next_token_on(
    make_runner: MakeRunner, prefill: Prefill
) -> None:
    runner = make_runner(page_size=PAGE_SIZE, token_budget=256, lane_blocks=11)
    row = prefill(runner, PROMPT)
    knobs = runner._spec.knobs
    runner.apply(replace(knobs, retrieval_stride=4))
    decode = DecodeRow(row=row, token=1, position=704)
    runner.run(StepPlan(chunks=(), decodes=(decode,)))
    assert runner.kv.kept.serves(runner.kv.rows[row], 705)
    runner.apply(knobs)
    assert not runner.kv.kept.serves(runner.kv.rows[row], 705)
