"""Studies of recordings: what is selected and ranked next, what is counted, what is refused."""

from __future__ import annotations

from dataclasses import replace
from math import floor

import numpy as np
import pytest

from sparsed.core import (
    WARMUP_STEPS,
    CachePolicy,
    CacheReport,
    CacheRow,
    CacheStudy,
    InputError,
    QuotaRule,
)
from sparsed.engine.evaluate.recording import Recording, RecordingHeader
from sparsed.engine.sim import trace as trace_module
from sparsed.engine.sim.replay import replay
from sparsed.engine.sim.study import simulate
from sparsed.engine.sim.trace import PAD, trace_recording

STUDY = CacheStudy(page_size=16, token_budget=112)  # six full pages
STEPS = 90
HEADER = RecordingHeader(
    model="tiny",
    text="words",
    method="quest",
    commit="0123abc",
    context_tokens=640,
    page_size=16,
    token_budget=112,
    sink_pages=1,
    recent_pages=1,
    num_kv_heads=2,
    dense_layers=0,
)


def record(*, seed: int = 0, steps: int = STEPS, lanes: int = 4, **header: object) -> Recording:
    """All pages ranked by scores that drift; those of the first lane stand still."""
    values = replace(HEADER, **header)  # type: ignore[arg-type]  # of its own fields
    rng = np.random.default_rng(seed)
    most = (values.context_tokens + steps) // values.page_size
    scores_LP = rng.normal(size=(lanes, most))
    moves_L1 = np.linspace(0, 0.6, lanes)[:, None]
    ranked_SLR = np.full((steps, lanes, 24), PAD, dtype=np.int32)
    for step in range(steps):
        num_full = (values.context_tokens + step) // values.page_size
        best_LX = np.argsort(-scores_LP[:, :num_full], axis=1)[:, :24]
        ranked_SLR[step, :, : best_LX.shape[1]] = best_LX
        scores_LP += moves_L1 * rng.normal(size=scores_LP.shape)
    return Recording(header=values, ranked_SLR=ranked_SLR)


def study(*recordings: Recording, **changes: object) -> CacheReport:
    wanted = replace(STUDY, **changes)  # type: ignore[arg-type]  # of its own fields
    return simulate(recordings, wanted, on_progress=lambda phase, frac: None)


def rows_of(report: CacheReport, policy: CachePolicy, quotas: QuotaRule) -> list[CacheRow]:
    return [row for row in report.rows if (row.policy, row.quotas) == (policy, quotas)]


def test_a_trace_touches_what_the_recording_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every lane, up to the names of the pages, which keep their order; in several chunks."""
    monkeypatch.setattr(trace_module, "_CHUNK_STEPS", 32)
    recording = record(context_tokens=70)  # fewer pages than the budget at first
    pages_SLX = recording.selection(range(STEPS), page_size=16, token_budget=112 + 3 * 16)
    trace = trace_recording(recording, page_size=16, token_budget=112, prefetch_pages=3)
    for lane in range(trace.num_lanes):
        names = np.unique(pages_SLX[:, lane][pages_SLX[:, lane] != PAD])
        for step in range(STEPS):
            selected, ahead = np.split(pages_SLX[step, lane], [6])
            found = trace.pages_SLK[step, lane]
            assert names[found[found != PAD]].tolist() == sorted(selected[selected != PAD])
            found = trace.ahead_SLM[step, lane]
            assert names[found[found != PAD]].tolist() == ahead[ahead != PAD].tolist()


def test_shares_are_of_the_steps_after_the_warm_up_of_every_recording() -> None:
    recordings = [record(seed=1), record(seed=2, steps=50)]
    report = study(*recordings, policies=(CachePolicy.LRU,), residencies=(1.5,))
    missed, selected, worst = 0, 0, []
    for recording in recordings:
        trace = trace_recording(recording, page_size=16, token_budget=112)
        missed_S = replay(trace, CachePolicy.LRU, capacity_L=np.full(4, 9)).missed_S[WARMUP_STEPS:]
        missed += missed_S.sum()
        selected += 24 * len(missed_S)
        worst.extend(missed_S / 24)
    (row,) = report.rows
    assert row.miss_frac == missed / selected > 0
    assert row.worst_miss_frac == np.quantile(worst, 0.99)
    assert (row.slots, row.min_slots, row.max_slots) == (36, 9, 9)
    assert (report.num_lanes, report.num_steps) == (4, STEPS - 32 + 18)
    assert report.mean_selected_pages == 6
    assert report.first_steps == (32, 32)


def test_more_slots_miss_less_and_belady_is_the_bound() -> None:
    report = study(record())
    for policy in CachePolicy:
        fracs = [row.miss_frac for row in rows_of(report, policy, QuotaRule.EQUAL)]
        assert len(fracs) == len(STUDY.residencies)
        assert fracs == sorted(fracs, reverse=True)
        assert all(frac >= report.first_touch_frac for frac in fracs)
    for first, second, bound in zip(*[iter(report.rows)] * 3, strict=True):
        assert bound.policy is CachePolicy.BELADY
        assert bound.miss_frac <= min(first.miss_frac, second.miss_frac)
    assert report.uneven_slots == {}


def test_uneven_quotas_give_to_lanes_that_move() -> None:
    """Of all slots as many as with equal ones; judged on the second half, beside equal ones. Two
    lanes stand still, two go to and fro between two selections that take ten slots."""
    ranked_SLR = np.tile(np.arange(24, dtype=np.int32), (STEPS, 4, 1))
    ranked_SLR[::2, 2:] = np.arange(24)[::-1]
    report = study(replace(record(), ranked_SLR=ranked_SLR), quotas=QuotaRule.UNEVEN)
    assert report.first_steps == (STEPS // 2,)
    for residency, slots in report.uneven_slots.items():
        assert sum(slots) == 4 * floor(float(residency) * 6)
    assert report.uneven_slots["1"] == (6, 6, 6, 6)
    assert report.uneven_slots["1.5"][0] < report.uneven_slots["1.5"][3]
    for policy in CachePolicy:
        equal = rows_of(report, policy, QuotaRule.EQUAL)
        uneven = rows_of(report, policy, QuotaRule.UNEVEN)
        assert [row.slots for row in equal] == [row.slots for row in uneven]
        assert uneven[1].miss_frac < equal[1].miss_frac
        assert uneven[1].max_slots == max(report.uneven_slots["1.5"])


def test_pages_ahead_are_counted_apart() -> None:
    plain, ahead = study(record()), study(record(), prefetch_pages=6)
    for before, after in zip(plain.rows, ahead.rows, strict=True):
        if after.policy is CachePolicy.BELADY or after.residency == 1:
            assert after == before
            assert (after.prefetched_frac, after.used_frac) == (0, None)
        else:
            assert after.miss_frac < before.miss_frac
            assert after.prefetched_frac > 0
            assert 0 < (after.used_frac or 0) <= 1


@pytest.mark.parametrize(
    ("recordings", "changes", "field", "words"),
    [
        ([record(steps=32)], {}, "recordings", "'words' has 32 steps, equal quotas need 33"),
        ([record(steps=65)], {"quotas": QuotaRule.UNEVEN}, "quotas", "65 steps, uneven quotas"),
        ([record(), record(lanes=2)], {}, "recordings", "tiny 2 lanes, tiny 4 lanes"),
        ([record(), record(model="big")], {}, "recordings", "big 4 lanes, tiny 4 lanes"),
        ([record()], {"token_budget": 480}, "token_budget", "multiple of page_size=16 from 48 to"),
        ([record()], {"page_size": 24}, "page_size", "no multiple of 16"),
        ([record()], {"prefetch_pages": 19}, "prefetch", "ranks 18 pages of 16 tokens beyond"),
        (
            [record(context_tokens=10, sink_pages=0, recent_pages=0)],
            {"page_size": 112, "token_budget": 224},
            "recordings",
            "select no full page",
        ),
    ],
)
def test_what_a_recording_cannot_tell_is_refused(
    recordings: list[Recording], changes: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        study(*recordings, **changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"policies": ()}, "policy"),
        ({"residencies": ()}, "residency"),
        ({"residencies": (2.0, 0.9)}, "residency"),
        ({"residencies": (float("nan"),)}, "residency"),
        ({"prefetch_pages": -1}, "prefetch"),
    ],
)
def test_studies_of_nothing_are_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(STUDY, **changes)  # type: ignore[arg-type]  # of its own fields
    assert caught.value.field == field


def test_the_shortest_recordings_are_enough() -> None:
    assert study(record(steps=33)).num_steps == 1
    assert study(record(steps=66), quotas=QuotaRule.UNEVEN).num_steps == 33
