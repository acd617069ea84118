"""Tokens against a slow, plain reading of the definitions; and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsed.core import AddRequest, SamplingParams
from sparsed.engine.draws import draw as draw_by_twin
from sparsed.engine.request import RequestState, Status
from sparsed.engine.sampler import NUM_CANDIDATES, Sampler, token_logprobs, uniform


def state(
    *, prompt: Sequence[int] = (0,), tokens: Sequence[int] = (), seed: int = 1, **params: Any
) -> RequestState:
    sampling = SamplingParams(max_tokens=10_000, **params)
    request = AddRequest(request_id=f"{seed}", prompt_tokens=tuple(prompt), sampling=sampling)
    return RequestState(request=request, seed=seed, status=Status.DECODE, tokens=list(tokens))


def draw(logits_V: Tensor, request: RequestState) -> int:
    return Sampler().sample(logits_V[None], requests=[request])[0].token_id


def reference(logits_V: Tensor, request: RequestState) -> int:
    """Sort everything, cut, put in the order of ids, cumulate."""
    params = request.sampling
    logits = logits_V.double().numpy() / params.temperature
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda token: (-logits[token], token))
    order = [token for token in order if probs[token] >= params.min_p * probs[order[0]]]
    order = order[: params.top_k or None]
    mass, kept = sum(probs[order]), 0.0
    for count, token in enumerate(order, 1):
        kept += probs[token] / mass
        if kept >= params.top_p and params.top_p < 1.0:
            order = order[:count]
            break
    order.sort()
    number = uniform(request.seed, index=len(request.tokens)) * sum(probs[order])
    for token in order:
        number -= probs[token]
        if number < 0:
            return token
    return order[-1]


params_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.2, 1.0, 3.0]),
        "top_p": st.sampled_from([0.0, 0.30710678, 0.90710678, 0.99931234, 1.0]),
        "top_k": st.sampled_from([0, 1, 5, 100, 1500, 10_000]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    }
)


@settings(max_examples=100)
@given(
    params=params_strategy,
    vocab=st.sampled_from([1, 7, NUM_CANDIDATES, NUM_CANDIDATES + 1, 3000]),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    levels=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_draws_follow_the_definitions(
    params: dict[str, Any], vocab: int, spread: float, levels: float | None, seed: int
) -> None:
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
    if levels:  # ties, as logits computed in 16 bits have them
        logits_V = (logits_V * levels).round() / levels
    request = state(seed=seed, **params)
    assert draw(logits_V, request) == reference(logits_V, request)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("vocab", [7, 700])
def test_the_host_draws_what_the_twin_of_the_device_draws(vocab: int, spread: float) -> None:
    numbers = np.random.default_rng([vocab, int(10 * spread)])
    for levels in (None, 2.0):
        logits_NV = torch.randn(300, vocab, generator=torch.Generator().manual_seed(1)) * spread
        if levels:
            logits_NV = (logits_NV * levels).round() / levels
        requests = [
            state(
                seed=int(numbers.integers(2**63)),
                tokens=[0] * int(numbers.integers(50)),
                temperature=numbers.choice([0.0, 1e-3, 0.7, 1.0, 1.7, 100.0]),
                top_p=numbers.choice([1e-9, 0.30710678, 0.90710678, 1.0]),
                min_p=numbers.choice([0.0, 0.0513, 1.0]),
                top_k=int(numbers.choice([0, 1, 40, 500])),
            )
            for _ in range(300)
        ]
        drawn = [draw.token_id for draw in Sampler().sample(logits_NV, requests=requests)]
        twins = draw_by_twin(logits_NV, draws=[request.draw for request in requests])
        assert drawn == twins.tolist()


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 3.0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 3}, [1, 2, 4]),  # the first of the two tied ones
        ({"top_p": 0.87}, [1, 2, 4]),
        ({"min_p": 0.1}, [1, 2, 4, 5]),
        ({"min_p": 0.1, "top_k": 3, "top_p": 0.9}, [1, 2]),
    ],
)
def test_frequencies_are_the_probabilities(params: dict[str, Any], kept: list[int]) -> None:
    """Pearson's chi-squared: its mean is the degrees of freedom, its variance twice that."""
    num_draws = 4000
    logits_V = torch.tensor([-1.0, 2.0, 1.0, -1.5, 0.0, 0.0])
    requests = [state(seed=5, tokens=[0] * index, **params) for index in range(num_draws)]
    draws = Sampler().sample(logits_V.expand(num_draws, -1), requests=requests)
    counts = np.bincount([draw.token_id for draw in draws], minlength=len(logits_V))
    assert sorted(set(counts.nonzero()[0].tolist())) == kept
    probs = torch.softmax(logits_V[kept] / params.get("temperature", 1.0), dim=0).numpy()
    expected = probs * num_draws
    chi_squared = ((counts[kept] - expected) ** 2 / expected).sum()
    freedom = len(kept) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom), (counts, expected)


def test_a_token_depends_on_seed_and_index_alone() -> None:
    logits_NV = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)) * 2
    requests = [
        state(seed=1),
        state(seed=2, temperature=0.0),
        state(seed=3, top_p=0.8),
        state(seed=4, top_k=20, tokens=[9, 9, 9]),
        state(seed=5, temperature=30.0),
        state(seed=6, repetition_penalty=1.3, prompt=(1, 2), tokens=[4], logprobs=2),
    ]
    alone = [draw(logits_NV[row], request) for row, request in enumerate(requests)]
    for order in ([5, 3, 1, 0, 4, 2], [4, 3], [2, 0, 5]):
        batch = Sampler().sample(logits_NV[order], requests=[requests[row] for row in order])
        assert [draw.token_id for draw in batch] == [alone[row] for row in order]


def test_uniform_numbers_are_pinned() -> None:
    """A replay in a later release must draw the same tokens."""
    numbers = [uniform(0, index=0), uniform(0, index=1), uniform(2**63, index=7)]
    assert numbers == [0.011546754286331562, 0.5023796042735054, 0.22240137654268188]
    assert uniform(-1, index=0) != uniform(1, index=0)
    many = [uniform(3, index=index) for index in range(2000)]
    assert len(set(many)) == 2000
    assert all(0.0 <= number < 1.0 for number in many)
    assert abs(sum(many) / 2000 - 0.5) < 0.02


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_no_temperature_is_the_first_of_the_most_likely(temperature: float) -> None:
    logits_V = torch.tensor([0.0, 5.0, 5.0, -2.0])
    assert draw(logits_V, state(temperature=temperature)) == 1
    assert draw(logits_V, state(temperature=temperature, logprobs=0)) == 1
    assert draw(logits_V, state(temperature=temperature, logit_bias=((3, 8.0),))) == 3


def test_bias_reaches_every_listed_token() -> None:
    logits_NV = torch.zeros(2, 4)
    requests = [
        state(logit_bias=((2, 100.0),)),
        state(logit_bias=((0, -100.0), (1, -100.0), (2, -100.0))),
    ]
    draws = Sampler().sample(logits_NV, requests=requests)
    assert [draw.token_id for draw in draws] == [2, 3]
    assert torch.equal(logits_NV, torch.zeros(2, 4)), "the caller's logits stay as they are"


@pytest.mark.parametrize(
    ("token", "logit", "penalised"),
    [
        (0, 4.0, 2.0),  # in the prompt
        (1, 4.0, 1.25),  # in the prompt, once in the output
        (2, -3.0, -7.0),  # twice in the output, negative
        (3, 4.0, 4.0),  # not seen
    ],
)
def test_penalties_are_those_of_the_definitions(token: int, logit: float, penalised: float) -> None:
    request = state(
        prompt=(0, 1),
        tokens=(1, 2, 2),
        temperature=0.0,
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
    )
    rival = 4
    for nudge, winner in ((-0.01, token), (0.01, rival)):
        logits_V = torch.full((5,), -1000.0)
        logits_V[token] = logit
        logits_V[rival] = penalised + nudge
        assert draw(logits_V, request) == winner


def test_counts_follow_the_output_and_are_forgotten() -> None:
    sampler = Sampler()
    logits_NV = torch.tensor([[3.0, 2.5, 2.0]])
    request = state(prompt=(2,), temperature=0.0, frequency_penalty=1.0)
    chosen = []
    for _ in range(5):
        token = sampler.sample(logits_NV, requests=[request])[0].token_id
        request.append(token)
        chosen.append(token)
    assert chosen == [0, 1, 0, 2, 1]
    sampler.forget(request.request_id)
    again = state(prompt=(2,), temperature=0.0, frequency_penalty=1.0)
    assert sampler.sample(logits_NV, requests=[again])[0].token_id == 0


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0, 0.0])
    request = state(temperature=0.0, logit_bias=((0, 50.0),), logprobs=2)
    drawn = Sampler().sample(logits_V[None], requests=[request])[0]
    raw = torch.log_softmax(logits_V, dim=0).tolist()
    own, *best = drawn.logprobs
    assert drawn.token_id == 0
    assert (own.token_id, own.rank) == (0, 3)
    assert math.isclose(own.logprob, raw[0], rel_tol=1e-6)
    assert [(entry.token_id, entry.rank) for entry in best] == [(1, 1), (2, 2)]
    assert all(math.isclose(e.logprob, raw[e.token_id], rel_tol=1e-6) for e in best)


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    entries = token_logprobs(torch.tensor([[0.0, 1.0]]), tokens=[0], num_best=20)
    assert [entry.token_id for entry in entries[0]] == [0, 1, 0]
    assert token_logprobs(torch.zeros(0, 5), tokens=[], num_best=3) == []
