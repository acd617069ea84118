"""Advice from scripted windows and trials, in this process and in the optimizer's own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
from serving import KNOBS, SNAPSHOT

from sparsed.core import (
    Bound,
    Decision,
    KnobValue,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Slo,
    TrialResult,
    TrialStatus,
    UnprovedProfile,
    Verdict,
    WaitReason,
)
from sparsed.tuner.live import propose
from sparsed.tuner.messages import Answer, LiveContext

WINDOW = replace(SNAPSHOT, ttft_p95_s=1.0, tpot_p95_s=0.1)  # late enough to repair


BUSY = Verdict(bound=Bound.COMPUTE, reason="products of matrices")
FULL = Verdict(bound=Bound.CAPACITY, reason="3 waiting", limit=WaitReason.ACTIVE_LIMIT)
LINK = Verdict(bound=Bound.LINK, reason="the link carries 80 %")
HBM = Verdict(bound=Bound.HBM, reason="K and V")


def advise(
    *,
    slo: Slo | None = None,
    trials: Sequence[TrialResult] = (),
    unproved: UnprovedProfile | None = None,
    verdict: Verdict = BUSY,
    failed: Sequence[RolloutRecord] = (),
    most: int | None = None,
    pins: frozenset[str] = frozenset(),
    **changes: object,
) -> Decision:
    window = replace(WINDOW, **changes)  # type: ignore[arg-type]  # fields by name
    context = LiveContext(
        windows=(window,) * 8,
        trials=tuple(trials),
        slo=slo or Slo(),
        verdict=verdict,
        failed=tuple(failed),
        unproved=unproved,
        max_prefill_chunk=most,
        pins=pins,
        recall=window.attention_recall,
    )
    return propose(context)


def reverted(before: dict[str, KnobValue], after: dict[str, KnobValue]) -> RolloutRecord:
    return RolloutRecord(
        state=RolloutState.REVERTED,
        reason=RolloutReason.NOT_BETTER,
        config_from=before,
        config_to=after,
        initiated_by="auto",
        at=90.0,
    )


def trial(number: int, score: float | None, **values: KnobValue) -> TrialResult:
    return TrialResult(
        number=number,
        arm="bayes",
        values=values,
        status=TrialStatus.OK if score else TrialStatus.OUT_OF_MEMORY,
        score=score,
        spread_frac=None,
        metrics={},
    )


RISING = [
    trial(i, 10.0 * active, max_num_active_seqs=active)
    for i, active in enumerate((1, 2, 3, 4, 6, 8, 12))
]


@pytest.mark.parametrize(
    ("slo", "changes", "values", "words"),
    [
        (Slo(min_recall=0.95), {}, {"token_budget": 3072}, "read more tokens"),
        (Slo(tpot_s=0.05), {}, {"max_num_active_seqs": 3}, "run fewer"),
        (Slo(ttft_s=0.5), {}, {"prefill_chunk": 768}, "too many steps"),
        (Slo(ttft_s=0.5), {"num_waiting": 3}, {"max_num_active_seqs": 6}, "wait for a place"),
        (Slo(ttft_s=0.5), {"steps": 0}, {}, "too little traffic"),
        (
            Slo(tpot_s=0.05),
            {"knobs": replace(KNOBS, max_num_active_seqs=1)},
            {},
            ".* at its bound",
        ),
        (Slo(tpot_s=0.05), {"tpot_p95_s": None}, {}, "there are no trials"),
    ],
)
def test_targets_are_repaired_by_one_step(
    slo: Slo, changes: dict[str, object], values: dict[str, KnobValue], words: str
) -> None:
    decision = advise(slo=slo, **changes)
    assert decision.values == values
    assert re.search(words, decision.reason)
    assert decision.made_at == 100.0


def test_a_repair_that_failed_makes_way_for_what_helps_what_binds() -> None:
    slo = Slo(tpot_s=0.05)
    failed = [reverted({"max_num_active_seqs": 4}, {"max_num_active_seqs": 3})]
    assert advise(slo=slo, verdict=LINK).values == {"max_num_active_seqs": 3}
    decision = advise(slo=slo, verdict=LINK, failed=failed)
    assert decision.values == {"residency_watermark": 0.05}


def test_a_target_that_cannot_be_repaired_makes_way_for_one_that_can() -> None:
    slo = Slo(min_recall=0.95, tpot_s=0.05)
    most = replace(KNOBS, token_budget=8192)
    assert advise(slo=slo, knobs=most).values == {"max_num_active_seqs": 3}
    pinned = advise(slo=slo, pins=frozenset({"token_budget"}))
    assert pinned.values == {"max_num_active_seqs": 3}
    failed = [reverted({"token_budget": 2048}, {"token_budget": 3072})]
    assert advise(slo=slo, failed=failed).values == {"max_num_active_seqs": 3}


STRIDE_ALONE = frozenset(
    {"token_budget", "hbm_budget", "max_num_active_seqs", "residency_watermark"}
)


@pytest.mark.parametrize(
    ("floor", "recall", "stride"),
    [(None, 0.9, None), (0.89, 0.9, None), (0.85, 0.9, 2), (0.85, None, None)],
)
def test_a_longer_stride_is_advised_well_over_a_floor_of_recall_alone(
    floor: float | None, recall: float | None, stride: int | None
) -> None:
    values = advise(
        slo=Slo(min_recall=floor), verdict=LINK, pins=STRIDE_ALONE, attention_recall=recall
    ).values
    assert values == ({} if stride is None else {"retrieval_stride": stride})


def test_low_recall_shortens_the_stride_before_more_is_read() -> None:
    long = replace(KNOBS, retrieval_stride=4)
    assert advise(slo=Slo(min_recall=0.95), knobs=long).values == {"retrieval_stride": 2}
    failed = [reverted({"retrieval_stride": 4}, {"retrieval_stride": 2})]
    decision = advise(slo=Slo(min_recall=0.95), knobs=long, failed=failed)
    assert decision.values == {"token_budget": 3072}


def test_pinned_knobs_are_not_advised() -> None:
    both = frozenset({"token_budget", "hbm_budget"})
    alone = advise(slo=Slo(min_recall=0.95), pins=both)
    assert alone.values == {}
    assert "token_budget is pinned, or was given" in alone.reason
    taken_along = advise(
        slo=Slo(min_recall=0.95),
        knobs=replace(KNOBS, hbm_budget=2048),
        pins=frozenset({"hbm_budget"}),
    )
    assert taken_along.values == {}
    assert "hbm_budget is pinned" in taken_along.reason
    assert advise(verdict=LINK).values == {"max_num_active_seqs": 3}
    pins = frozenset({"max_num_active_seqs"})
    assert advise(verdict=LINK, pins=pins).values == {"residency_watermark": 0.05}
    both = pins | {"residency_watermark"}
    assert "residency_watermark" not in advise(verdict=LINK, pins=both).values
    assert "max_num_active_seqs" not in advise(trials=RISING, pins=pins).values


def test_a_knob_with_one_value_is_at_its_bound() -> None:
    single = replace(KNOBS, max_num_seqs=1, max_num_active_seqs=1)
    assert "is at its bound" in advise(slo=Slo(tpot_s=0.05), knobs=single).reason
    short = replace(KNOBS, max_model_len=256, token_budget=256)
    assert "is at its bound" in advise(slo=Slo(min_recall=0.95), knobs=short).reason


def test_no_larger_chunk_is_advised_than_memory_has_room_for() -> None:
    slo = Slo(ttft_s=0.5)
    assert advise(slo=slo, most=512).values == {}
    assert advise(slo=slo, most=767).values == {}
    assert advise(slo=slo, most=768).values == {"prefill_chunk": 768}
    profile = UnprovedProfile(name="profile #1", values={"prefill_chunk": 1024}, why="torch 1 -> 2")
    assert advise(unproved=profile, most=1023).values == {}
    assert advise(unproved=profile, most=1024).values == profile.values


def test_trials_of_this_machine_lead_uphill_one_rung() -> None:
    decision = advise(trials=RISING)
    assert decision.values["max_num_active_seqs"] == 6
    assert decision.current_score == 50.0
    assert decision.predicted_score is not None and 60.0 < decision.predicted_score < 90.0
    KNOBS.with_values(decision.values)


def test_trials_that_load_in_another_way_tell_nothing() -> None:
    others = [replace(one, values={**one.values, "copy_programs": 8}) for one in RISING]
    same = [replace(one, values={**one.values, "copy_programs": None}) for one in RISING]
    assert "there are no trials" in advise(trials=others).reason
    assert advise(trials=same).values == advise(trials=RISING).values != {}


def test_trials_do_not_lead_to_what_failed() -> None:
    failed = [reverted({"max_num_active_seqs": 4}, {"max_num_active_seqs": 6})]
    decision = advise(trials=RISING, failed=failed)
    assert "max_num_active_seqs" not in decision.values


def test_at_the_top_it_holds() -> None:
    knobs = replace(KNOBS, max_num_active_seqs=16)
    trials = [*RISING, trial(8, 160.0, max_num_active_seqs=16)]
    decision = advise(trials=trials, knobs=knobs)
    assert decision.values == {}
    assert decision.reason.startswith("no step")
    assert decision.predicted_score is None


def test_infeasible_trials_alone_are_no_ground_for_advice() -> None:
    decision = advise(trials=[trial(i, None, max_num_active_seqs=i + 1) for i in range(8)])
    assert "there are no trials" in decision.reason


WHOLE = replace(KNOBS, hbm_budget=4096)


@pytest.mark.parametrize(
    ("verdict", "slo", "changes", "values"),
    [
        (FULL, Slo(), {}, {"max_num_active_seqs": 6}),
        (FULL, Slo(), {"knobs": replace(KNOBS, max_num_active_seqs=16)}, {}),
        (LINK, Slo(), {"knobs": WHOLE}, {"hbm_budget": 6144}),
        (LINK, Slo(), {}, {"max_num_active_seqs": 3}),
        (LINK, Slo(min_recall=0.89), {}, {"max_num_active_seqs": 3}),
        (LINK, Slo(min_recall=0.85), {}, {"token_budget": 1536}),
        (HBM, Slo(), {}, {}),
        (HBM, Slo(min_recall=0.85), {"attention_recall": None}, {}),
        (BUSY, Slo(), {}, {}),
    ],
)
def test_without_trials_it_takes_a_step_that_helps_what_binds(
    verdict: Verdict, slo: Slo, changes: dict[str, object], values: dict[str, KnobValue]
) -> None:
    decision = advise(verdict=verdict, slo=slo, **changes)
    assert decision.values == values
    assert decision.reason.startswith(f"{verdict.bound}: {verdict.reason}; ")


def test_without_trials_it_takes_the_next_step_where_one_failed() -> None:
    failed = [reverted({"max_num_active_seqs": 4}, {"max_num_active_seqs": 3})]
    decision = advise(verdict=LINK, failed=failed)
    assert decision.values == {"residency_watermark": 0.05}
    failed.append(reverted({"residency_watermark": 0.1}, {"residency_watermark": 0.05}))
    assert advise(verdict=LINK, failed=failed).values == {}


def test_a_compatible_profile_comes_before_anything_else() -> None:
    profile = UnprovedProfile(
        name="profile #1 on torch 2",
        values={"max_num_active_seqs": 12, "prefill_chunk": 128, "token_budget": 2048},
        why="torch 1 -> 2",
    )
    whole = {"max_num_active_seqs": 12, "prefill_chunk": 128}
    decision = advise(slo=Slo(tpot_s=0.05), trials=RISING, unproved=profile)
    assert decision.values == whole, "however many rungs away"
    assert decision.reason == "profile #1 on torch 2, to be proved first: torch 1 -> 2"
    assert decision.predicted_score is None
    assert advise(unproved=profile, steps=0).values == whole
    in_force = KNOBS.with_values(whole)
    assert "run fewer" in advise(slo=Slo(tpot_s=0.05), unproved=profile, knobs=in_force).reason
    for values in ({}, {"max_num_active_seqs": KNOBS.max_num_seqs + 1}):
        left = replace(profile, values=values)
        assert advise(trials=RISING, unproved=left).values == advise(trials=RISING).values
    failed = [reverted({"max_num_active_seqs": 4}, {"max_num_active_seqs": 8})]
    assert advise(unproved=profile, failed=failed).values == {}, "quarantined for a while"


@pytest.mark.slow
def test_the_process_says_the_same() -> None:
    profile = UnprovedProfile(name="profile #1", values={"hbm_budget": None}, why="torch 1 -> 2")
    failed = (reverted({"max_num_active_seqs": 4}, {"max_num_active_seqs": 3}),)
    context = LiveContext(
        windows=(WINDOW,) * 3,
        trials=tuple(RISING),
        slo=Slo(),
        verdict=FULL,
        failed=failed,
        unproved=profile,
    )
    line = msgspec.json.encode(context) + b"\n"
    done = subprocess.run(
        [sys.executable, "-m", "sparsed.tuner.optimizer"],
        input=line * 2,
        capture_output=True,
        check=True,
        timeout=60,
    )
    answers = [msgspec.json.decode(line, type=Answer) for line in done.stdout.splitlines()]
    assert answers == [Answer(decision=propose(context))] * 2
