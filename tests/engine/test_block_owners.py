"""Blocks that change hands while requests run: whoever loses some tells the same text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from sparsed.core import AddRequest, SamplingParams, Service
from sparsed.engine.engine import Engine
from sparsed.engine.runner import Runner
from sparsed.engine.step_decoder import StepDecoder

MakeRunner = Callable[..., Runner]
LENGTHS = (1003, 1037)  # eight blocks and nine, and a partial page each
OUTPUT = 32


def prompts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randint(1, 200) for _ in range(length)] for length in LENGTHS]


def run(runner: Runner, arrivals: Sequence[tuple[int, Sequence[int]]]) -> list[list[int]]:
    """Texts of prompts, each of which comes before a step."""
    engine = Engine(runner, knobs=runner._spec.knobs, service=Service(recall_floor=0.0))
    texts: list[list[int]] = [[] for _ in arrivals]
    sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    for step in range(500):
        for number, (at_step, prompt) in enumerate(arrivals):
            if at_step == step:
                engine.add(
                    AddRequest(
                        request_id=str(number), prompt_tokens=tuple(prompt), sampling=sampling
                    )
                )
        for output in engine.step().outputs if engine.has_work else ():
            assert output.error is None
            if output.token_id is not None:
                texts[int(output.request_id)].append(output.token_id)
    assert all(len(text) == OUTPUT for text in texts)
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("lane_blocks", [12, 14, 16])
def test_a_newcomers_prompt_changes_no_text(
    make_runner: MakeRunner,
    make_steps: Callable[[Runner], StepDecoder],
    lane_blocks: int,
    queued: bool,
) -> None:
    """It takes blocks of one that decodes, whole until then, in the very step."""

    def runner() -> Runner:
        made = make_runner(
            lane_blocks=lane_blocks, token_budget=256, page_size=8, max_model_len=2048
        )
        if queued:
            made.steps = make_steps(made)
        return made

    for seed in range(2):
        first, second = prompts(seed)
        alone = run(runner(), [(0, first)])
        assert run(runner(), [(0, first), (8, second)])[0] == alone[0]


@pytest.mark.slow
@pytest.mark.parametrize("lane_blocks", [12, 13, 14, 16])
def test_prompts_of_one_step_change_no_text(make_runner: MakeRunner, lane_blocks: int) -> None:
    """The second takes blocks of the first, before either is computed."""
    knobs = {"lane_blocks": lane_blocks, "token_budget": 256, "page_size": 8, "max_model_len": 2048}
    for seed in range(2):
        pair = prompts(seed)
        alone = [run(make_runner(**knobs), [(0, prompt)])[0] for prompt in pair]
        assert run(make_runner(**knobs), [(0, prompt) for prompt in pair]) == alone
