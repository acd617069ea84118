"""Moments noted inside a captured graph: every replay notes them anew."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from sparsed.engine.fetch_times import TimedStep
from sparsed.engine.kvcache.streams import Moment, new_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda:0")
CYCLES = 4_000_000  # of a fetch that is a sleep: milliseconds


def sleep(cycles: int) -> None:
    if cycles:
        torch.cuda._sleep(cycles)


def captured(own_cycles: int, count_1: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, TimedStep]:
    """A step whose main stream works for ``own_cycles`` beside its only fetch."""
    side = new_stream(CUDA, priority=-1)
    assert side is not None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        step = TimedStep(CUDA)
        fetch = step.fetch()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            fetch.starts()
            sleep(CYCLES)
            fetch.ends(count_1)
            is_over = side.record_event()
        sleep(own_cycles)
        fetch.is_needed()
        main.wait_event(is_over)
        count_1.add_(0)
    return graph, step


@pytest.mark.parametrize(
    ("own_frac", "exposed_frac"), [(0, 1.0), (0.25, 0.75), (0.75, 0.25), (2, 0)]
)
def test_a_graph_tells_what_its_fetches_take(own_frac: float, exposed_frac: float) -> None:
    count_1 = torch.zeros(1, dtype=torch.int32, device=CUDA)
    sleep(10 * CYCLES)  # clocks rise
    graph, step = captured(int(own_frac * CYCLES), count_1)
    exposed_fracs = []
    for replay in range(7):
        before = Moment(CUDA)
        before.note()
        count_1.fill_(replay)
        graph.replay()
        num_pages = step.num_pages()
        after = Moment(CUDA)
        after.note()
        torch.cuda.synchronize()
        under_way, exposed = step.seconds()
        assert int(num_pages) == replay
        assert 1e-4 < under_way < after.seconds_after(before)
        assert 0 <= step._begin.seconds_after(before), "noted by an earlier replay"
        exposed_fracs.append(exposed / under_way)
    usual = median(exposed_fracs)  # whatever else the device did meanwhile
    assert usual == pytest.approx(exposed_frac, abs=0.1), exposed_fracs


def test_a_step_that_is_launched_is_timed_alike() -> None:
    count_1 = torch.ones(1, dtype=torch.int32, device=CUDA)
    step = TimedStep(CUDA)
    fetch = step.fetch()
    fetch.is_needed()
    fetch.starts()
    sleep(CYCLES)
    fetch.ends(count_1)
    torch.cuda.synchronize()
    under_way, exposed = step.seconds()
    assert 1e-4 < under_way <= exposed < 2 * under_way
