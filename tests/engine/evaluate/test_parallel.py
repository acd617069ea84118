"""All positions at once: what real decode steps give, and what no method may do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsed.core import (
    BudgetRule,
    Choice,
    EngineSpec,
    GroupRule,
    InputError,
    MetadataFormat,
    RankMethod,
    SparseMethod,
)
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.evaluate.attend import LayerAttention
from sparsed.engine.evaluate.calibration import Calibration
from sparsed.engine.evaluate.context import Context
from sparsed.engine.evaluate.methods import MIN_PAGES, Methods, PageMethod
from sparsed.engine.evaluate.metrics import bootstrap_ratio
from sparsed.engine.evaluate.parallel import Scores, score_text, token_logprobs
from sparsed.engine.evaluate.race import Race
from sparsed.engine.evaluate.rankers import OracleRanker
from sparsed.engine.evaluate.texts import Window
from sparsed.engine.runner import Runner
from sparsed.engine.sparse.base import SINK_PAGES, recent_pages

NUM_CONTEXT = 700
NUM_SCORED = 40
BUDGET_TOKENS = 256
NUM_LAYERS = 2
SHARE = BUDGET_TOKENS / NUM_CONTEXT
ORACLE = Choice(
    method=RankMethod.ORACLE, share=SHARE, page_size=8, group_rule=GroupRule.SOFTMAX_SUM
)
H, G, D = 2, 2, 16  # KV heads, query heads of each, head dim
SCALE = D**-0.5


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def runner(checkpoint: Path, make_runner: Callable[..., Runner]) -> Runner:
    return make_runner(checkpoint, max_model_len=1024)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return random.Random(0).choices(range(3, 320), k=NUM_CONTEXT + NUM_SCORED + 1)


def score(
    runner: Runner, tokens: list[int], choice: Choice, *, calibration: Calibration | None = None
) -> Scores:
    context = Context(runner.decoder, tokens[:NUM_CONTEXT], num_scored=NUM_SCORED)
    methods = Methods(
        choice,
        num_layers=NUM_LAYERS,
        num_tokens=NUM_CONTEXT,
        scale=context.scale,
        calibration=calibration,
    )
    return score_text(runner.decoder, context, tokens[NUM_CONTEXT:], methods=methods)


def step_by_step(runner: Runner, tokens: list[int], method: str) -> Tensor:
    """Log-probabilities of the scored tokens, each from a decode step of its own."""
    context, scored = tuple(tokens[:NUM_CONTEXT]), tokens[NUM_CONTEXT:]
    row = runner.kv.add(len(tokens), method=SparseMethod(method), token_budget=BUDGET_TOKENS)
    chunk = PromptChunk(
        row=row, tokens=context, start=0, prompt_length=NUM_CONTEXT, logits_from=NUM_CONTEXT
    )
    runner.run(StepPlan(chunks=(chunk,), decodes=()))
    logits = []
    for position, token in enumerate(scored[:-1], start=NUM_CONTEXT):
        decode = DecodeRow(row=row, token=token, position=position)
        logits.append(runner.run(StepPlan(chunks=(), decodes=(decode,))).logits_NV.clone())
    runner.kv.free(row)
    return token_logprobs(torch.cat(logits), torch.tensor(scored[1:]))


# -- against the engine, and against itself --------------------------------------------------


@pytest.mark.parametrize(
    ("method", "page_size", "dense_layers"),
    [("cuboid-mean", 8, 0), ("quest", 32, 0), ("cuboid-mean", 16, 1)],
)
def test_equals_the_runner_step_by_step(
    method: str,
    page_size: int,
    dense_layers: int,
    checkpoint: Path,
    tokens: list[int],
    make_runner: Callable[..., Runner],
) -> None:
    """The runner keeps summaries in float32 here, so the evaluation must too."""
    knobs = {"token_budget": BUDGET_TOKENS, "hbm_budget": 2 * BUDGET_TOKENS}
    knobs |= {"page_size": page_size, "dense_layers": dense_layers, "max_model_len": 1024}
    runner = make_runner(checkpoint, sparse_method=method, max_num_seqs=1, **knobs)
    serial_N = step_by_step(runner, tokens, method)
    choice = Choice(
        method=RankMethod(method),
        share=(SHARE * (NUM_LAYERS - dense_layers) + dense_layers) / NUM_LAYERS,
        page_size=page_size,
        metadata=MetadataFormat.FP32,
        dense_layers=dense_layers,
        sink_pages=SINK_PAGES,
        recent_pages=recent_pages(page_size),
    )
    parallel = score(runner, tokens, choice)
    torch.testing.assert_close(parallel.logprobs_N, serial_N, rtol=0, atol=1e-4)
    dense = score(runner, tokens, Choice(method=RankMethod.DENSE))
    assert (dense.logprobs_N - serial_N).abs().max() > 1e-2  # sparsity does matter here
    assert runner.stats().hot_misses > 0


def test_mean_keys_are_ranked_as_by_the_runner(
    checkpoint: Path, tokens: list[int], make_spec: Callable[..., EngineSpec], tmp_path: Path
) -> None:
    """With the basis that the runner has learned and kept: maps, centre, bits and votes."""
    spec = make_spec(
        checkpoint,
        sparse_method="mean-key",
        token_budget=BUDGET_TOKENS,
        hbm_budget=2 * BUDGET_TOKENS,
        max_model_len=1024,
    )
    runner = Runner(replace(spec, cache_dir=str(tmp_path)), on_progress=lambda *_: None)
    serial_N = step_by_step(runner, tokens, "mean-key")
    (kept,) = (tmp_path / "bases").glob("*.safetensors")
    names = {
        "keys_LHDR": "basis.keys",
        "queries_LHDR": "basis.queries",
        "centre_LHD": "basis.centre",
    }
    calibration = Calibration({names[k]: v for k, v in load_file(kept).items()})
    choice = Choice(
        method=RankMethod.MEAN,
        share=SHARE,
        page_size=8,
        metadata=MetadataFormat.INT4,
        group_rule=GroupRule.SOFTMAX_SUM,
        kept_dims=D,
        recent_pages=8,
    )
    parallel = score(runner, tokens, choice, calibration=calibration)
    torch.testing.assert_close(parallel.logprobs_N, serial_N, rtol=0, atol=1e-4)
    coarse = score(runner, tokens, replace(choice, kept_dims=2), calibration=calibration)
    assert (coarse.logprobs_N - serial_N).abs().max() > 1e-2  # the ranking does matter here


def test_a_share_of_one_is_dense(runner: Runner, tokens: list[int]) -> None:
    dense = score(runner, tokens, Choice(method=RankMethod.DENSE))
    for method in (RankMethod.QUEST, RankMethod.CLUSTERS):
        whole = score(runner, tokens, Choice(method=method, share=1.0))
        assert torch.equal(whole.logprobs_N, dense.logprobs_N)
        assert torch.equal(whole.layers[0].reads_H, dense.layers[0].reads_H)


def test_reads_are_about_the_share(runner: Runner, tokens: list[int]) -> None:
    for dense_layers, share in ((0, SHARE), (1, 0.7)):
        choice = replace(ORACLE, share=share, dense_layers=dense_layers)
        scores = score(runner, tokens, choice)
        reads = torch.stack([layer.reads_H.mean() for layer in scores.layers]).mean()
        grown = NUM_SCORED * dense_layers / NUM_LAYERS  # dense layers read what is added, too
        assert abs(float(reads) - share * NUM_CONTEXT) < 8 + grown


def test_oracle_covers_most_and_random_least(runner: Runner, tokens: list[int]) -> None:
    """On the first layer, where every choice sees the same queries and keys."""

    def recall_N(choice: Choice) -> Tensor:
        return score(runner, tokens, choice).layers[0].recall_NHG.mean((1, 2))

    best_N, random_N = recall_N(ORACLE), recall_N(replace(ORACLE, method=RankMethod.RANDOM))
    assert best_N.mean() > random_N.mean()
    methods = ("cuboid-mean", "quest", "mean", "mean-spread", "variance", "every-key")
    for method in methods:
        for rule in GroupRule:
            ranked_N = recall_N(replace(ORACLE, method=RankMethod(method), group_rule=rule))
            assert (best_N >= ranked_N - 1e-5).all(), (method, rule)
            assert ranked_N.mean() > random_N.mean(), (method, rule)


def test_the_race_always_has_dense_first(runner: Runner, tokens: list[int]) -> None:
    window = Window(context=tuple(tokens[:NUM_CONTEXT]), scored=tuple(tokens[NUM_CONTEXT:]))
    race = Race(runner.decoder, [ORACLE, ORACLE], calibration=None)
    dense, oracle = race.run_text("noise", [window, window], on_progress=lambda *_: None)
    assert (dense.choice.method, dense.ratio, dense.ratio_low) == (RankMethod.DENSE, 1.0, 1.0)
    assert oracle.choice == ORACLE
    assert oracle.num_tokens == 2 * NUM_SCORED
    assert oracle.ratio == pytest.approx(oracle.perplexity / dense.perplexity, rel=1e-5)
    assert oracle.ratio_low < oracle.ratio < oracle.ratio_high
    assert [len(heads) for heads in oracle.recall_by_head] == [H * G] * NUM_LAYERS


def test_interval_holds_the_ratio() -> None:
    losses = np.random.default_rng(1).normal(0.03, 0.2, size=(3, 4000)).astype(np.float32)
    low, high = bootstrap_ratio(list(losses))
    assert low < np.exp(losses.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / losses.size**0.5, rel=0.15)


@pytest.mark.parametrize("run", [1, 4, 16])
def test_interval_is_wider_where_neighbours_are_alike(run: int) -> None:
    """Of runs of equal losses as wide as of as many independent ones as there are runs."""
    losses = np.random.default_rng(run).normal(0.0, 0.2, size=(4, 4096 // run))
    low, high = bootstrap_ratio(list(losses.repeat(run, axis=1).astype(np.float32)))
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / losses.size**0.5, rel=0.2)


def test_windows_are_not_drawn_only_what_is_in_them() -> None:
    losses = [np.full(n, loss, dtype=np.float32) for n, loss in ((1, 0.9), (300, 0.1), (700, 0.4))]
    ratio = np.exp(np.concatenate(losses).mean(dtype=np.float64))
    assert bootstrap_ratio(losses) == pytest.approx((ratio, ratio), rel=1e-6)


def test_a_short_window_has_an_interval_too() -> None:
    losses = np.random.default_rng(2).normal(0.0, 0.2, size=33).astype(np.float32)
    low, high = bootstrap_ratio([losses])
    assert high - low == pytest.approx(2 * 1.96 * losses.std() / 33**0.5, rel=0.5)
    assert low < np.exp(losses.mean()) < high


# -- the future ------------------------------------------------------------------------------


def layer_inputs(seed: int = 0, *, num_tokens: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of every token, keys and values; the keys of neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    q_MHGD = 2 * torch.randn((num_tokens, H, G, D), generator=generator)
    keys, values = (torch.randn((H, num_tokens, D), generator=generator) for _ in range(2))
    topics_HPD = torch.randn((H, num_tokens // 32, D), generator=generator)
    return q_MHGD, keys / 2 + topics_HPD.repeat_interleave(32, 1), values


CHOICES = [
    *(Choice(method=m, share=1 / 4, page_size=16) for m in RankMethod if m is not RankMethod.GATE),
    *(
        Choice(method=RankMethod.MEAN, share=1 / 4, page_size=16, group_rule=rule)
        for rule in GroupRule
    ),
    Choice(
        method=RankMethod.VARIANCE, share=1 / 4, page_size=32, grain=8, metadata=MetadataFormat.INT4
    ),
    Choice(method=RankMethod.CUBOID_MEAN, share=1 / 4, page_size=16, super_pages=4, coarse=2.0),
    Choice(method=RankMethod.MEAN, share=1 / 4, page_size=16, estimated=1 / 4),
    Choice(method=RankMethod.CLUSTERS, share=1 / 2, estimated=1 / 4),
    Choice(method=RankMethod.QUEST, share=1 / 4, page_size=16, sink_pages=0, recent_pages=2),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_no_position_sees_the_future(choice: Choice) -> None:
    """What comes after a position changes nothing of it: not its output, nor what it selects."""
    first, cut = 384, 384 + 45  # the middle of a page
    q_MHGD, keys_HMD, values_HMD = layer_inputs()
    others = layer_inputs(1)
    found = []
    for changed in (False, True):
        keys, values = keys_HMD.clone(), values_HMD.clone()
        if changed:
            keys[:, cut:], values[:, cut:] = 9 * others[1][:, cut:], others[2][:, cut:]
        methods = Methods(choice, num_layers=1, num_tokens=first, scale=SCALE)
        attention = LayerAttention(keys, values, methods.open(0, keys, values), scale=SCALE)
        found.append(attention(q_MHGD[first:], first=first))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before[: cut - first], after[: cut - first])
    if choice.method is not RankMethod.DENSE:
        assert not torch.equal(found[0][0][cut - first :], found[1][0][cut - first :])
    pages_nHK = found[0][4]
    full_n = torch.arange(first, len(q_MHGD)) // choice.page_size
    assert (pages_nHK < full_n[:, None, None]).all()


def test_forced_pages_come_first() -> None:
    choice = Choice(method=RankMethod.MEAN, share=1 / 4, page_size=16, sink_pages=2, recent_pages=3)
    q_MHGD, keys_HMD, values_HMD = layer_inputs()
    methods = Methods(choice, num_layers=1, num_tokens=384, scale=SCALE)
    method = methods.open(0, keys_HMD, values_HMD)
    pages_nHK = LayerAttention(keys_HMD, values_HMD, method, scale=SCALE)(q_MHGD[384:], first=384)[
        4
    ]
    for position, pages_HK in enumerate(pages_nHK.tolist(), start=384):
        newest = position // 16
        for pages_K in pages_HK:
            assert {0, 1, newest - 1, newest - 2, newest - 3} <= set(pages_K)
            assert len(set(pages_K)) == 384 // 4 // 16 - 1


def test_all_pages_are_dense() -> None:
    """The way of a selection, with every page in it, gives what dense attention gives."""
    q_MHGD, keys_HMD, values_HMD = layer_inputs()
    method = PageMethod(
        OracleRanker(GroupRule.MEAN, scale=SCALE),
        Choice(method=RankMethod.ORACLE, page_size=16),
        counts_H=torch.full((H,), 512 // 16),
        estimate=None,
        ranks=1,
    )
    attention = LayerAttention(keys_HMD, values_HMD, method, scale=SCALE)
    o_nHGD, recall_nHG, error_nHG, *_ = attention(q_MHGD[384:], first=384)
    logits = torch.einsum("nhgd,hmd->nhgm", q_MHGD[384:], keys_HMD) * SCALE
    future = torch.arange(512) > torch.arange(384, 512)[:, None]
    weights = logits.masked_fill(future[:, None, None], float("-inf")).softmax(-1)
    torch.testing.assert_close(o_nHGD, torch.einsum("nhgm,hmd->nhgd", weights, values_HMD))
    torch.testing.assert_close(recall_nHG, torch.ones_like(recall_nHG))
    assert error_nHG.max() < 1e-5


# -- budgets ---------------------------------------------------------------------------------


def selected(choice: Choice, *, calibration: Calibration | None = None) -> list[int]:
    """Pages that each KV head selects."""
    q_MHGD, keys_HMD, values_HMD = layer_inputs()
    methods = Methods(choice, num_layers=1, num_tokens=384, scale=SCALE, calibration=calibration)
    method = methods.open(0, keys_HMD, values_HMD)
    pages_nHK = LayerAttention(keys_HMD, values_HMD, method, scale=SCALE)(q_MHGD[384:], first=384)[
        4
    ]
    counts_nH = (pages_nHK >= 0).sum(-1)
    assert (counts_nH == counts_nH[0]).all()
    counts: list[int] = counts_nH[0].tolist()
    return counts


def test_a_calibration_moves_reads_between_heads() -> None:
    choice = Choice(method=RankMethod.MEAN, share=1 / 2, page_size=16, budgets=BudgetRule.HEAD)
    calibration = Calibration({"budget.head": torch.tensor([[1.5, 0.5]])})
    equal = 384 // 2 // 16 - 1
    assert selected(replace(choice, budgets=BudgetRule.EQUAL)) == [equal, equal]
    assert sum(selected(choice, calibration=calibration)) == 2 * equal
    few = Calibration({"budget.head": torch.tensor([[1.99, 0.01]])})
    assert (
        selected(choice, calibration=few)[1] == MIN_PAGES
    )  # the first, the newest, and one that is chosen
    for missing in (None, Calibration({})):
        with pytest.raises(InputError, match="calibration") as caught:
            selected(choice, calibration=missing)
        assert caught.value.field == "calibration"


def test_dense_layers_must_leave_something_to_read() -> None:
    choice = Choice(method=RankMethod.MEAN, share=1 / 8, dense_layers=2)
    with pytest.raises(InputError, match="2 dense layers of 16 alone"):
        Methods(choice, num_layers=16, num_tokens=384, scale=SCALE)
    Methods(choice, num_layers=17, num_tokens=384, scale=SCALE)


def test_pages_always_read_are_read_whatever_the_share() -> None:
    choice = Choice(
        method=RankMethod.MEAN, share=1 / 16, page_size=16, sink_pages=3, recent_pages=4
    )
    methods = Methods(choice, num_layers=1, num_tokens=512, scale=1.0)
    keys_HMD = torch.randn((2, 640, 8))
    method = methods.open(0, keys_HMD, keys_HMD)
    chosen = method.choose(torch.randn((1, 2, 3, 8)), torch.zeros((1, 2, 3, 640)), first=515)
    assert chosen is not None
    for pages in chosen.pages_nHK[0].tolist():
        assert {0, 1, 2, 28, 29, 30, 31} == set(pages)
