"""Attention in place where it is cheaper than a selection: the rule, and steps that follow it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import CopyPath, EngineSpec, SparseMethod
from sparsed.engine.batch import DecodeRow, StepPlan
from sparsed.engine.in_place import MARGIN, InPlaceRule, Overhead
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.runner import Runner
from sparsed.engine.step_decoder import StepDecoder
from sparsed.engine.step_graphs import GraphKey

MakeSteps = Callable[..., StepDecoder]
Prefill = Callable[..., int]
PAGE = 8


LOAD = CopyChoice(CopyPath.KERNEL, 8, 512)
ALONE = GraphKey(1, 64, in_place=False, fetches=False, times=False, load=None)
MIXED = ALONE._replace(in_place=True, fetches=True, load=LOAD)


def flat(overhead_s: float) -> Overhead:
    return Overhead(few_pages=1, few_s=overhead_s, many_pages=2, many_s=overhead_s)


def make_rule(overhead_s: float) -> InPlaceRule:
    """A token takes a microsecond, a summary nothing."""
    rule = InPlaceRule(token_bytes=1, summary_bytes=0.0, page_size=PAGE, bytes_per_s=1e6)
    rule.learn(ALONE, flat(overhead_s))
    return rule


@given(
    overhead_s=st.floats(0, 1),
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 10**6)), min_size=1, max_size=9),
)
def test_what_is_chosen_is_at_most_a_margin_dearer(
    overhead_s: float, steps: list[tuple[int, int]]
) -> None:
    rule = make_rule(overhead_s)
    for rows, tokens in steps:
        selected = min(tokens, 2000)
        in_place = rule.choose(ALONE, num_selecting=rows, tokens=tokens, selected=selected)
        costs = {True: tokens * 1e-6, False: overhead_s + selected * 1e-6}
        assert costs[in_place] <= costs[not in_place] / (1 - MARGIN) + 1e-12


def test_nothing_flips_at_the_boundary() -> None:
    rule = make_rule(0.01)
    chosen = {
        rule.choose(ALONE, num_selecting=1, tokens=tokens, selected=2000)
        for tokens in (11990, 12010) * 5
    }
    assert len(chosen) == 1


@given(overhead_s=st.floats(0, 1), other_s=st.floats(0, 1), tokens=st.integers(0, 10**6))
def test_a_step_is_judged_by_its_own_graph(overhead_s: float, other_s: float, tokens: int) -> None:
    """What another one takes, or what this one took once, changes nothing."""
    one, other = make_rule(overhead_s), make_rule(other_s)
    one.learn(MIXED, flat(other_s))
    other.learn(ALONE, flat(overhead_s))
    chosen = [
        rule.choose(ALONE, num_selecting=1, tokens=tokens, selected=min(tokens, 2000))
        for rule in (one, other)
    ]
    assert chosen[0] == chosen[1]


def test_a_graph_unlike_all_that_were_timed_selects() -> None:
    rule = make_rule(1e3)
    assert not rule.choose(MIXED, num_selecting=1, tokens=9000, selected=2000)
    assert rule.choose(ALONE, num_selecting=1, tokens=9000, selected=2000), "as before"


@pytest.mark.parametrize("near_s", [0.0, 1e3])
def test_a_graph_to_come_is_judged_by_the_nearest(near_s: float) -> None:
    """Of its kind: of as many requests, then of as wide a selection."""
    rule, far_s = make_rule(1e3 - near_s), 1e3 - near_s
    for key, overhead_s in (
        (ALONE._replace(size=4, pages=31), far_s),
        (ALONE._replace(size=4), near_s),
        (ALONE._replace(size=8, pages=255), far_s),
        (MIXED._replace(size=4, pages=255), far_s),
    ):
        rule.learn(key, flat(overhead_s))
    wide = ALONE._replace(size=4, pages=255)
    assert rule.choose(wide, num_selecting=4, tokens=9000, selected=2000) == bool(near_s)
    rule.learn(wide, flat(far_s))
    assert rule.choose(wide, num_selecting=4, tokens=9000, selected=2000) == bool(far_s)


@given(few=st.floats(0, 1), rise=st.floats(0, 1), pages=st.floats(0, 9999))
def test_an_overhead_grows_with_the_pages(few: float, rise: float, pages: float) -> None:
    line = Overhead(few_pages=100, few_s=few, many_pages=4000, many_s=few + rise)
    assert line.at(100) == pytest.approx(few) and line.at(4000) == pytest.approx(few + rise)
    assert 0.0 <= line.at(pages) <= line.at(pages + 1) + 1e-12


@pytest.mark.parametrize("overhead_s", [0.0, 1e3])
def test_a_step_in_place_is_a_dense_one(
    make_spec: Callable[..., EngineSpec],
    make_steps: MakeSteps,
    prefill: Prefill,
    overhead_s: float,
) -> None:
    """And the request tells so. Nothing but the rule differs."""
    runners = [
        Runner(
            make_spec(page_size=PAGE, token_budget=256, lane_blocks=40), on_progress=lambda *_: None
        )
        for _ in range(2)
    ]
    other = runners[1]
    tokens = [i * i % 199 for i in range(900)]
    rows = [
        prefill(runner, tokens, method=method)
        for runner, method in zip(runners, (SparseMethod.DENSE, SparseMethod.MEAN_KEY), strict=True)
    ]
    other.steps = make_steps(other)
    other.steps.rule = make_rule(overhead_s)
    for position in range(900, 905):
        logits = [
            runner.run(
                StepPlan(
                    chunks=(), decodes=(DecodeRow(row=row, token=position % 7, position=position),)
                )
            )
            for runner, row in zip(runners, rows, strict=True)
        ]
        same = torch.allclose(logits[0].logits_NV, logits[1].logits_NV, atol=1e-4)
        assert same == bool(overhead_s)
    found = other.kv.details(rows[1])
    assert found.sparse_steps == (0 if overhead_s else 5)
    assert (found.tokens_read == found.tokens_dense) == bool(overhead_s)
    other.kv.check_integrity()
