"""Random selections of few lanes, with padding, whose pages mostly stay from step to step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sparsed.engine.sim.trace import PAD, Pages, Trace, make_trace

Draw = Callable[..., Trace]


def draw_ranked(
    seed: int, *, steps: int, lanes: int, ranks: int, pages: int, stay: float, ragged: bool
) -> Pages:
    """Different pages (S, L, R) of each lane and step, the first ones mostly those of before."""
    rng = np.random.default_rng(seed)
    ranked_SLR = np.full((steps, lanes, ranks), PAD, dtype=np.int32)
    for lane in range(lanes):
        order = rng.permutation(pages)
        for step in range(steps):
            moves = rng.random(pages) > stay
            order = order[np.argsort(np.arange(pages) + moves * rng.normal(0, pages, pages))]
            count = rng.integers(1, ranks + 1) if ragged else ranks
            ranked_SLR[step, lane, :count] = order[:count]
    return ranked_SLR


@pytest.fixture(scope="session")
def draw() -> Draw:
    """``draw(seed, selected=K, ahead=M, ...)``: a random trace."""

    def draw_trace(
        seed: int,
        *,
        steps: int = 30,
        lanes: int = 3,
        selected: int = 4,
        ahead: int = 0,
        pages: int = 20,
        stay: float = 0.8,
        ragged: bool = False,
    ) -> Trace:
        ranked_SLR = draw_ranked(
            seed,
            steps=steps,
            lanes=lanes,
            ranks=selected + ahead,
            pages=pages,
            stay=stay,
            ragged=ragged,
        )
        return make_trace(ranked_SLR[..., :selected], ranked_SLR[..., selected:])

    return draw_trace
