"""What a window of a trial becomes, without an engine; with one, tests/acceptance/test_tune.py."""

from __future__ import annotations

import pytest

from sparsed.controller.trial_window import TrialWindow, link_rate
from sparsed.controller.trials import STATUSES
from sparsed.core import (
    CopyPath,
    Direction,
    EngineFacts,
    EngineStats,
    FailureCause,
    FinishReason,
    LinkEntry,
    LinkProbe,
    TokenBatch,
    TokenOutput,
    TrialStatus,
)
from sparsed.tuner.objective import CRASHES, TrialFailed
from sparsed.tuner.policy import TEACHING_CRASHES


def facts(*entries: LinkEntry) -> EngineFacts:
    return EngineFacts(
        pid=1,
        device_name="any",
        weights_bytes=1,
        load_s=1.0,
        link=LinkProbe(h2d_bytes_per_s=9e9, d2h_bytes_per_s=9e9),
        versions={},
        copies=entries,
    )


def entry(direction: Direction, bytes_per_s: float) -> LinkEntry:
    return LinkEntry(
        direction=direction,
        piece_bytes=4096,
        path=CopyPath.KERNEL,
        programs=32,
        tile_bytes=4096,
        bytes_per_s=bytes_per_s,
    )


def test_the_links_rate_is_that_of_loads_and_a_cpu_has_none() -> None:
    assert link_rate(facts(entry(Direction.D2H, 1e9), entry(Direction.H2D, 2e9))) == 2e9
    assert link_rate(facts()) is None


@pytest.mark.parametrize(
    ("seen", "rate", "peak", "busy"),
    [
        ((0.5, 0.9, 0.7), 1e6, 0.9, 0.75),
        ((0.5, None, 0.4), None, 0.5, None),
        ((None,), 1e6, None, 0.75),
    ],
)
def test_the_peak_of_a_window_and_the_share_of_the_link(
    seen: tuple[float | None, ...], rate: float | None, peak: float | None, busy: float | None
) -> None:
    window = TrialWindow(started_s=10.0, ended_s=12.0)
    for frac in seen:
        window.look(EngineStats(hot_used_bytes=7), hbm_frac=frac)
    told = window.measurement(
        before=EngineStats(h2d_bytes=500_000),
        after=EngineStats(h2d_bytes=2_000_000),
        link_bytes_per_s=rate,
    )
    assert (told.hbm_peak_frac, told.link_busy_frac) == (peak, busy)
    assert (told.h2d_bytes, told.hot_peak_bytes) == (1_500_000, 7)


def test_every_cause_is_a_status_that_is_a_crash() -> None:
    assert set(STATUSES) == set(FailureCause)
    assert all(status in CRASHES for status in STATUSES.values())


def test_somebodys_kill_teaches_nothing_and_the_kernels_does() -> None:
    killed, starved = (
        CRASHES[STATUSES[cause]] for cause in (FailureCause.KILLED, FailureCause.HOST_MEMORY)
    )
    assert killed not in TEACHING_CRASHES and starved in TEACHING_CRASHES


def test_a_request_that_is_refused_blames_the_configuration() -> None:
    refused = TokenOutput(
        request_id="one",
        index=0,
        token_id=None,
        finish_reason=FinishReason.ERROR,
        error="the hot tier cannot hold it",
    )
    window = TrialWindow(started_s=0.0)
    window.expect("one", sent_s=0.0)
    with pytest.raises(TrialFailed, match="hot tier") as caught:
        window.take(TokenBatch(outputs=(refused,)))
    assert caught.value.status is TrialStatus.INVALID_CONFIG
