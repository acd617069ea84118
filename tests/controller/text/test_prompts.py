"""The prompts of trials are text where the model has any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from sparsed.controller.prompts import (
    RandomPrompts,
    TextPrompts,
    prompt_source,
    reference_prompts,
)
from sparsed.controller.startup import StartPlan
from sparsed.controller.tokenizer import Tokenizer
from sparsed.core import InputError, Workload, WorkloadRequest

TEXT = tuple(range(1000, 1100))


def workload(*lengths: int) -> Workload:
    requests = (
        WorkloadRequest(arrival_s=0.0, input_tokens=length, output_tokens=8) for length in lengths
    )
    return Workload(name="w", requests=tuple(requests))


@pytest.mark.parametrize(
    "source",
    [
        RandomPrompts(vocab_size=100),
        TextPrompts(text=TEXT),
        TextPrompts(text=TEXT, first_tokens=(1, 2)),
    ],
)
def test_prompts_have_their_lengths_and_follow_the_seed(
    source: RandomPrompts | TextPrompts,
) -> None:
    lengths = (1, 40, 250, 40)
    prompts = source.make(workload(*lengths), seed=3)
    assert [len(prompt) for prompt in prompts] == [*lengths]
    assert prompts == source.make(workload(*lengths), seed=3)
    assert prompts != source.make(workload(*lengths), seed=5)
    assert prompts[1] != prompts[3]


def test_windows_follow_each_other_and_go_around_the_end() -> None:
    prompts = TextPrompts(text=TEXT).make(workload(40, 30, 50), seed=0)
    tokens = [token for prompt in prompts for token in prompt]
    assert {(b - a) % len(TEXT) for a, b in pairwise(tokens)} == {1}
    assert {*TEXT} == {*tokens}


def test_every_prompt_begins_as_in_the_daemon(byte_fallback_directory: Path) -> None:
    tokenizer = Tokenizer.load(byte_fallback_directory)
    source = reference_prompts(tokenizer)
    (first,) = source.first_tokens
    assert tokenizer.token_bytes(first) == b"<s>"
    prompts = source.make(workload(600, 600), seed=1)
    assert [prompt[0] for prompt in prompts] == [first, first]
    assert all(first not in prompt[1:] for prompt in prompts)


def test_the_text_is_real(byte_level_directory: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_directory)
    (prompt,) = reference_prompts(tokenizer).make(workload(3000), seed=1)
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    assert text.count(" the ") > 10 and "\ufffd" not in text[4:-4]


def test_a_dummy_reads_random_tokens(plan_start: Callable[..., StartPlan]) -> None:
    plan = plan_start()
    source = prompt_source(plan)
    assert isinstance(source, RandomPrompts)
    assert source.vocab_size == plan.model.vocab_size
    assert "says nothing" in source.description


def test_a_model_reads_text(
    plan_start: Callable[..., StartPlan], byte_level_directory: Path, tmp_path: Path
) -> None:
    plan = replace(plan_start(), tokenizer_dir=byte_level_directory)
    assert isinstance(prompt_source(plan), TextPrompts)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        prompt_source(replace(plan, tokenizer_dir=tmp_path))
