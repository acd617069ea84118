"""Whole studies on a synthetic engine: a landscape with a memory cliff, noise and targets."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_benches import ScriptedBenches

from sparsed.core import (
    AcceptanceWindow,
    DecisionReason,
    Guard,
    Knobs,
    KnobValue,
    Measurement,
    Objective,
    SearchMethod,
    Slo,
    TrialResult,
    TrialStatus,
    WindowStage,
)
from sparsed.tuner.beliefs import Expectation
from sparsed.tuner.constrained import MemoryLimit
from sparsed.tuner.objective import OutOfTime, TrialFailed, window_metrics
from sparsed.tuner.offline import StudyOutcome, StudyPlan, run_study
from sparsed.tuner.space import build_space
from sparsed.tuner.verification import offline_rule

DEFAULT = Knobs(
    token_budget=2048,
    hbm_budget=None,
    max_num_active_seqs=2,
    prefill_chunk=512,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=16,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=8192,
)
SPACE = build_space(DEFAULT, auto_hbm_budget=4096)


class SyntheticEngine:
    """Faster with more sequences and smaller budgets; out of memory past a product of both."""

    def __init__(
        self,
        *,
        noise_frac: float = 0.0,
        stop_after: int | None = None,
        stop_with: type[BaseException] = KeyboardInterrupt,
        noise_seed: int = 0,
    ) -> None:
        self.calls: list[Mapping[str, KnobValue]] = []
        self.orders: list[int] = []
        self.noise_frac = noise_frac
        self.stop_after = stop_after
        self.stop_with = stop_with
        self._generator = random.Random(noise_seed)

    def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
        if len(self.calls) == self.stop_after:
            raise self.stop_with
        self.calls.append(values)
        self.orders.append(order)
        knobs = DEFAULT.with_values(values)
        if knobs.max_num_active_seqs * (knobs.hbm_budget or 4096) > 40_000:
            raise TrialFailed("the hot tier is full", status=TrialStatus.OUT_OF_MEMORY)
        step_s = 0.01 + knobs.max_num_active_seqs * (0.002 + knobs.token_budget * 2e-6)
        noise = 1.0 + self.noise_frac * self._generator.uniform(-1.0, 1.0)
        speed = knobs.max_num_active_seqs / step_s * noise
        return Measurement(
            duration_s=1000.0 / speed,
            output_tokens=1000,
            ttft_s=(0.1,),
            tpot_s=(step_s,),
            sparse_steps=1000,
            attention_recall=1.0 - 100.0 / knobs.token_budget,
            hot_hit_frac=0.9,
            h2d_bytes=0,
            hot_peak_bytes=0,
        )


def plan(
    *,
    num_trials: int = 5,
    slo: Slo | None = None,
    seed: int = 1,
    method: SearchMethod = SearchMethod.CONSTRAINED,
) -> StudyPlan:
    return StudyPlan(
        space=SPACE,
        objective=Objective.THROUGHPUT,
        slo=slo or Slo(),
        num_trials=num_trials,
        seed=seed,
        method=method,
    )


def study(
    engine: SyntheticEngine,
    previous: Sequence[TrialResult] = (),
    left_frac: Callable[[], float] | None = None,
    benches: ScriptedBenches | None = None,
    **changes: object,
) -> tuple[StudyOutcome, list[TrialResult]]:
    recorded: list[TrialResult] = []
    windows: list[AcceptanceWindow] = []
    outcome = run_study(
        benches or ScriptedBenches(engine),
        plan=plan(**changes),  # type: ignore[arg-type]  # fields by name
        record=recorded.append,
        record_window=windows.append,
        left_frac=left_frac or (lambda: 1.0),
        previous=previous,
    )
    assert tuple(windows) == (outcome.comparison.windows if outcome.comparison else ())
    return outcome, recorded


def test_what_is_known_beforehand_reaches_the_constrained_search_alone() -> None:
    """A prior that calls for one knob, and a memory that holds few requests."""

    def expect(values: Mapping[str, KnobValue]) -> Expectation:
        chunk = DEFAULT.with_values(values).prefill_chunk
        return Expectation(objective=-abs(chunk - 1024) / 512)

    def need(values: Mapping[str, KnobValue]) -> float:
        return float(DEFAULT.with_values(values).max_num_active_seqs)

    limit = MemoryLimit(predict=need, limit_bytes=3.0, margin_bytes=1.0)
    recorded: list[TrialResult] = []
    run_study(
        ScriptedBenches(SyntheticEngine()),
        plan=replace(plan(num_trials=6), prior=expect, memory=limit),
        record=recorded.append,
        record_window=lambda window: None,
        left_frac=lambda: 1.0,
    )
    active = {
        arm: [
            DEFAULT.with_values(trial.values).max_num_active_seqs
            for trial in recorded
            if trial.arm == arm
        ]
        for arm in ("bayes", "random")
    }
    assert len(active["bayes"]) == 6 and max(active["bayes"]) <= 2 < max(active["random"])
    tried = [trial.values["prefill_chunk"] for trial in recorded if trial.arm == "bayes"]
    assert set(tried[1:]) <= {768, 1024, 1536}, tried


def reason_of(outcome: StudyOutcome) -> DecisionReason | None:
    return outcome.comparison.verdict.reason if outcome.comparison else None


@pytest.mark.parametrize(
    ("method", "arms"),
    [
        (SearchMethod.CONSTRAINED, ("bayes", "random")),
        (SearchMethod.SKOPT, ("skopt", "random")),
        (SearchMethod.GRID, ("grid", "random")),
        (SearchMethod.RANDOM, ("random",)),
    ],
)
def test_random_search_runs_beside_every_method(
    method: SearchMethod, arms: tuple[str, ...]
) -> None:
    _, recorded = study(SyntheticEngine(), num_trials=2, method=method)
    assert [trial.arm for trial in recorded] == ["default", *arms * 2]
    values = [tuple(trial.values.items()) for trial in recorded if trial.arm in arms]
    assert len(set(values)) == len(values)


def test_a_study_compares_both_arms_and_verifies_the_winner() -> None:
    outcome, recorded = study(SyntheticEngine(noise_frac=0.01))
    assert [trial.number for trial in recorded] == [*range(11)]
    arms = [trial.arm for trial in recorded]
    assert arms == ["default", *["bayes", "random"] * 5]
    assert recorded[0].values == SPACE.default_values
    assert all(trial.spread_frac is not None for trial in recorded if trial.score)
    assert outcome.winner is not None
    assert reason_of(outcome) is DecisionReason.ACCEPTED
    assert len(outcome.default_scores) == len(outcome.winner_scores) == 32
    assert median(outcome.winner_scores) > median(outcome.default_scores)
    assert outcome.reason.startswith("accepted: +")


def test_the_best_three_and_the_default_are_ranked_in_other_arrival_orders() -> None:
    engine = SyntheticEngine(noise_frac=0.01)
    outcome, recorded = study(engine, num_trials=8)
    assert outcome.comparison is not None
    windows = outcome.comparison.windows
    ranked = [window for window in windows if window.stage is WindowStage.RANK]
    assert [window.order for window in ranked] == [order for order in range(1, 6) for _ in range(4)]
    scores = {str(trial.values): trial.score for trial in recorded if trial.score}
    best = sorted(scores, key=lambda values: scores[values], reverse=True)[:3]
    assert {str(window.values) for window in ranked} == {*best, str(SPACE.default_values)}
    assert len(scores) > 4
    assert engine.orders[: engine.orders.count(0)] == [0] * engine.orders.count(0)


def test_the_test_pairs_windows_of_the_same_order_and_discards_after_changes() -> None:
    engine = SyntheticEngine(noise_frac=0.01)
    outcome, _ = study(engine)
    assert outcome.comparison is not None
    tested = [item for item in outcome.comparison.windows if item.stage is WindowStage.TEST]
    assert [item.order for item in tested] == [order for order in range(6, 38) for _ in "AB"]
    sides = [item.values == SPACE.default_values for item in tested]
    assert sides == [True, False, False, True] * 16
    assert len(engine.calls) - len(outcome.comparison.windows) == engine.orders.count(0) + 33


def test_a_lucky_candidate_loses_to_one_whose_worst_is_better() -> None:
    """The search saw only the good side of sixteen sequences."""

    class Moody(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            measured = super().__call__(values, order)
            is_stalled = values["max_num_active_seqs"] == 16 and order % 3 == 1
            return replace(measured, duration_s=measured.duration_s * (4 if is_stalled else 1))

    engine = Moody()
    previous = []
    for number, (arm, num_seqs) in enumerate((("default", 2), ("bayes", 16), ("random", 8))):
        values = SPACE.default_values | {"max_num_active_seqs": num_seqs, "hbm_budget": 2048}
        score = 1000.0 / engine(values, 0).duration_s
        previous.append(
            TrialResult(
                number=number,
                arm=arm,
                values=values,
                status=TrialStatus.OK,
                score=score,
                spread_frac=0.0,
                metrics={"attention_recall": 0.95},
            )
        )
    assert previous[1].score == max(trial.score or 0.0 for trial in previous)
    outcome, recorded = study(engine, previous, num_trials=1)
    assert recorded == []
    assert outcome.winner == previous[2]


def test_the_rule_guards_what_was_given() -> None:
    rule = offline_rule(objective=Objective.THROUGHPUT, slo=Slo())
    assert (rule.guards, rule.targets) == ((Guard.ERRORS, Guard.QUALITY), {})
    assert (rule.metric, rule.num_pairs, rule.num_rounds) == ("output_tokens_per_s", 32, 5)
    slo = Slo(ttft_s=1.0, tpot_s=0.05, min_recall=0.9)
    rule = offline_rule(objective=Objective.GOODPUT, slo=slo)
    assert rule.guards == (Guard.TTFT, Guard.TPOT, Guard.ERRORS)
    assert rule.targets == {Guard.TTFT: 1.0, Guard.TPOT: 0.05, Guard.QUALITY: 0.9}
    assert rule.metric == "goodput_requests_per_s"


@pytest.mark.parametrize(
    ("recall", "sparse_steps", "quality"), [(0.9, 5, 0.9), (None, 0, 1.0), (None, 5, None)]
)
def test_quality_is_known_where_it_was_sampled_or_nothing_was_sparse(
    recall: float | None, sparse_steps: int, quality: float | None
) -> None:
    measured = replace(
        SyntheticEngine()(SPACE.default_values, 0),
        attention_recall=recall,
        sparse_steps=sparse_steps,
        errors=1,
    )
    figures = window_metrics(measured, slo=Slo())
    assert figures["quality"] == quality
    assert figures["error_frac"] == 0.5  # one that was answered, one that was not
    assert figures["output_tokens_per_s"] == 1000 / measured.duration_s


def test_infeasible_configurations_are_recorded_and_never_win() -> None:
    slo = Slo(tpot_s=0.05)
    outcome, recorded = study(SyntheticEngine(), slo=slo, num_trials=12)
    seen = {trial.status for trial in recorded}
    assert {TrialStatus.OUT_OF_MEMORY, TrialStatus.SLO_BROKEN} <= seen
    for trial in recorded:
        assert (trial.score is None) == (trial.status is not TrialStatus.OK)
        assert trial.score is not None or trial.reason
    assert outcome.winner is not None
    assert outcome.winner.metrics["tpot_p95_s"] <= 0.05


def test_without_a_floor_the_default_sets_one() -> None:
    _, recorded = study(SyntheticEngine(), num_trials=8)
    floor = recorded[0].metrics["attention_recall"] / 1.03
    for trial in recorded:
        recall = trial.metrics.get("attention_recall", 1.0)
        assert (recall < floor) == (trial.status is TrialStatus.RECALL_BROKEN)
    assert any(trial.status is TrialStatus.RECALL_BROKEN for trial in recorded)


def test_a_dense_default_sets_a_floor_too() -> None:
    class DenseByDefault(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            measured = super().__call__(values, order)
            if DEFAULT.with_values(values).token_budget >= DEFAULT.token_budget:
                return replace(measured, attention_recall=None, sparse_steps=0)
            return replace(measured, attention_recall=0.5)

    outcome, recorded = study(DenseByDefault(), num_trials=8)
    assert any(trial.status is TrialStatus.RECALL_BROKEN for trial in recorded)
    assert all(trial.metrics.get("attention_recall") != 0.5 for trial in outcome.best.values())


@pytest.mark.parametrize("slo", [Slo(), Slo(min_recall=0.5)])
def test_an_unsampled_candidate_never_wins(slo: Slo) -> None:
    class Unsampled(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            measured = super().__call__(values, order)
            is_default = values == SPACE.default_values
            return measured if is_default else replace(measured, attention_recall=None)

    outcome, recorded = study(Unsampled(), slo=slo)
    assert outcome.winner is None and set(outcome.best) == {"default"}
    unchecked = [trial for trial in recorded if "never sampled" in trial.reason]
    assert unchecked and all(trial.status is TrialStatus.RECALL_BROKEN for trial in unchecked)


def test_noise_alone_is_not_verified() -> None:
    class Flat(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            return super().__call__(SPACE.default_values, order)

    engines = [Flat(noise_frac=0.05, noise_seed=seed) for seed in range(8)]
    reasons = [reason_of(study(engine, num_trials=2)[0]) for engine in engines]
    assert DecisionReason.ACCEPTED not in reasons
    assert {DecisionReason.OUTRANKED, DecisionReason.NO_GAIN} <= set(reasons)


@pytest.mark.parametrize("gain", [1.6, 6.0])
def test_too_much_noise_decides_nothing_but_what_is_surely_more(gain: float) -> None:
    class Erratic(SyntheticEngine):
        """Faster than the default, within a factor of three."""

        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            measured = super().__call__(SPACE.default_values, order)
            factor = 1.0 if values == SPACE.default_values else gain
            return replace(measured, duration_s=measured.duration_s / factor)

    outcome, _ = study(Erratic(noise_frac=0.5))
    is_sure = gain == 6.0
    assert (outcome.winner is not None) is is_sure
    assert reason_of(outcome) is (DecisionReason.ACCEPTED if is_sure else DecisionReason.NOISY)
    assert outcome.reason.endswith("; the default stays") is not is_sure


def test_a_default_that_cannot_run_ends_the_study() -> None:
    class Broken(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            raise TrialFailed("no memory", status=TrialStatus.OUT_OF_MEMORY)

    outcome, recorded = study(Broken())
    assert (outcome.winner, len(recorded)) == (None, 1)
    assert outcome.reason == "the default configuration failed: no memory"


def test_a_default_outside_its_targets_can_be_replaced() -> None:
    outcome, recorded = study(SyntheticEngine(), slo=Slo(tpot_s=0.02), num_trials=12)
    assert recorded[0].status is TrialStatus.SLO_BROKEN
    assert outcome.winner is not None
    assert outcome.default_scores == ()


@pytest.mark.parametrize(
    ("good_calls", "reason"),
    [(24, DecisionReason.OUTRANKED), (60, DecisionReason.CANDIDATE_FAILED)],
)
def test_a_winner_that_breaks_in_verification_is_dropped(
    good_calls: int, reason: DecisionReason
) -> None:
    class Fragile(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            measured = super().__call__(values, order)
            if len(self.calls) > good_calls and values != SPACE.default_values:
                raise TrialFailed("died", status=TrialStatus.ENGINE_ERROR)
            return measured

    engine = Fragile()
    outcome, _ = study(engine)
    assert outcome.winner is None
    assert reason_of(outcome) is reason
    assert outcome.comparison is not None
    assert outcome.comparison.windows[-1].status in (TrialStatus.ENGINE_ERROR, TrialStatus.OK)
    assert len(engine.calls) <= good_calls + 20  # not the whole test in vain


@pytest.mark.parametrize("stop_after", [0, 1, 7, 15, 40, 80])
def test_ctrl_c_keeps_what_was_measured_and_resume_ends_the_same(stop_after: int) -> None:
    whole, all_trials = study(SyntheticEngine())
    outcome, first = study(SyntheticEngine(stop_after=stop_after))
    assert outcome.interrupted and outcome.winner is None
    if outcome.comparison is None:
        assert first[-1].status is TrialStatus.INTERRUPTED
    else:
        assert reason_of(outcome) is DecisionReason.NOT_ENOUGH and outcome.comparison.windows
    resumed, second = study(SyntheticEngine(), first)
    assert resumed.winner is not None and whole.winner is not None
    assert resumed.winner.values == whole.winner.values
    assert (resumed.default_scores, resumed.winner_scores, resumed.reason) == (
        whole.default_scores,
        whole.winner_scores,
        whole.reason,
    )
    finished = [trial for trial in [*first, *second] if trial.status is not TrialStatus.INTERRUPTED]
    numbers = [trial.number for trial in [*first, *second]]
    assert numbers == [*range(len(numbers))]

    def key(trial: TrialResult) -> tuple[str, object]:
        return trial.arm, sorted((k, str(v)) for k, v in trial.values.items())

    assert [key(trial) for trial in finished] == [key(trial) for trial in all_trials]


@pytest.mark.parametrize(("stop_after", "num_pairs"), [(30, 0), (70, 12), (200, 32)])
def test_a_test_that_runs_out_of_time_decides_nothing(stop_after: int, num_pairs: int) -> None:
    engine = SyntheticEngine(stop_after=stop_after, stop_with=OutOfTime)
    outcome, recorded = study(engine)
    assert not outcome.interrupted
    assert outcome.comparison is not None
    assert len(recorded) == 11
    if len(engine.calls) < stop_after:
        assert outcome.winner is not None  # it ended before
        return
    assert (reason_of(outcome), outcome.winner) == (DecisionReason.NOT_ENOUGH, None)
    assert outcome.comparison.verdict.num_pairs == num_pairs


def test_a_search_that_runs_out_of_time_leaves_a_decision_too() -> None:
    outcome, recorded = study(SyntheticEngine(stop_after=11, stop_with=OutOfTime))
    assert recorded[-1].status is TrialStatus.INTERRUPTED
    assert reason_of(outcome) is DecisionReason.NOT_ENOUGH
    with pytest.raises(OutOfTime):
        study(SyntheticEngine(stop_after=1, stop_with=OutOfTime))
    cut = study(SyntheticEngine(stop_after=2, stop_with=OutOfTime))[0]
    assert (cut.comparison, cut.winner) == (None, None)
    assert "in the time that the search had" in cut.reason


def test_the_search_leaves_time_for_the_test() -> None:
    engine = SyntheticEngine()
    outcome, recorded = study(engine, left_frac=lambda: 1.0 - len(engine.calls) / 25)
    assert len(recorded) < 11
    assert 10 <= engine.orders.count(0) <= 11  # two fifths of 25, and the end of a trial
    assert outcome.winner is not None


def test_the_seed_decides_the_study() -> None:
    def values(seed: int) -> list[Mapping[str, KnobValue]]:
        return [trial.values for trial in study(SyntheticEngine(), seed=seed)[1]]

    assert values(1) == values(1)
    assert values(1) != values(2)


# several devices


def by_trial(benches: ScriptedBenches) -> list[tuple[int, Mapping[str, KnobValue]]]:
    """(place, values) of the windows of the search, in the order in which they began."""
    return [(place, values) for place, values, order in benches.begun if order == 0]


@settings(max_examples=25)
@given(
    num_devices=st.integers(1, 4),
    order=st.lists(st.integers(0, 1000), min_size=64, max_size=64),
    method=st.sampled_from([SearchMethod.RANDOM, SearchMethod.GRID]),
)
def test_whatever_ends_first_the_budget_is_kept_and_nothing_is_tried_twice(
    num_devices: int, order: list[int], method: SearchMethod
) -> None:
    ends = iter(order * 4)
    benches = ScriptedBenches(
        SyntheticEngine(), num_devices=num_devices, pick=lambda num: next(ends) % num
    )
    outcome, recorded = study(
        SyntheticEngine(), benches=benches, num_trials=6, method=method, slo=Slo(min_recall=0.1)
    )
    assert [trial.number for trial in recorded] == [*range(len(recorded))]
    assert recorded[0].arm == "default" and recorded[0].device == "test:0"
    assert [place for place, _ in by_trial(benches)[:2]] == [0, 0]
    for arm in plan(method=method).arms:
        tried = [str(trial.values) for trial in recorded if trial.arm == arm]
        assert len(tried) == 6 and len(set(tried)) == 6
    for trial in recorded:
        places = {place for place, values in by_trial(benches) if values == trial.values}
        assert trial.device in {f"test:{place}" for place in places}
    assert benches.most_under_way == num_devices
    assert benches.left_alone == (0 if outcome.comparison else None)
    assert {place for place, _, turn in benches.begun if turn > 0} <= {0}


def test_both_measurements_of_a_trial_are_on_one_device() -> None:
    benches = ScriptedBenches(SyntheticEngine(), num_devices=3, pick=lambda num: num - 1)
    _, recorded = study(SyntheticEngine(), benches=benches, num_trials=6)
    for trial in recorded:
        served = [place for place, values in by_trial(benches) if values == trial.values]
        same = sum(other.values == trial.values for other in recorded)
        assert len(served) in ((2 * same, same) if trial.score is None else (2 * same,))
        assert f"test:{served[0]}" == trial.device or same > 1
    assert {trial.device for trial in recorded} == {"test:0", "test:1", "test:2"}


def test_the_random_arm_is_the_same_on_any_number_of_devices() -> None:
    def drawn(num_devices: int) -> list[str]:
        benches = ScriptedBenches(SyntheticEngine(), num_devices=num_devices)
        recorded = study(SyntheticEngine(), benches=benches, num_trials=6)[1]
        return sorted(str(trial.values) for trial in recorded if trial.arm == "random")

    assert drawn(1) == drawn(2) == drawn(4)


def test_the_constrained_search_tries_as_much_on_several_devices() -> None:
    benches = ScriptedBenches(SyntheticEngine(noise_frac=0.01), num_devices=3)
    outcome, recorded = study(SyntheticEngine(), benches=benches, num_trials=9)
    tried = [str(trial.values) for trial in recorded if trial.arm == "bayes"]
    assert len(tried) == 9
    assert all(tried.count(values) <= 2 for values in tried)  # twice: before it is recommended
    assert reason_of(outcome) is DecisionReason.ACCEPTED


@pytest.mark.parametrize("status", [TrialStatus.DEVICE_ERROR, TrialStatus.OUT_OF_MEMORY])
def test_a_device_that_always_fails_stops_nobody_else(status: TrialStatus) -> None:
    """A broken one gets no more trials after three; what does not fit is no fault of a device."""
    benches = ScriptedBenches(lambda values, order: serve(values, order), num_devices=2)
    engine = SyntheticEngine()

    def serve(values: Mapping[str, KnobValue], order: int) -> Measurement:
        place = next(place for place, given, _ in reversed(benches.begun) if given is values)
        if place == 1:
            raise TrialFailed("fell off the bus", status=status)
        return engine(values, order)

    outcome, recorded = study(engine, benches=benches, num_trials=8)
    assert len(recorded) == 17
    lost = [trial for trial in recorded if trial.device == "test:1"]
    assert all(trial.status is status for trial in lost)
    assert len(lost) == 3 if status is TrialStatus.DEVICE_ERROR else len(lost) > 3
    assert sum(trial.score is not None for trial in recorded) >= 2
    assert outcome.comparison is None or outcome.comparison.windows


def test_the_verification_is_on_the_first_device_that_still_works() -> None:
    benches = ScriptedBenches(lambda values, order: serve(values, order), num_devices=3)
    engine = SyntheticEngine()

    def serve(values: Mapping[str, KnobValue], order: int) -> Measurement:
        place = next(place for place, given, _ in reversed(benches.begun) if given is values)
        if place == 0 and values != SPACE.default_values:
            raise TrialFailed("fell off the bus", status=TrialStatus.DEVICE_ERROR)
        return engine(values, order)

    outcome, recorded = study(engine, benches=benches, num_trials=8)
    assert [trial.device for trial in recorded].count("test:0") == 4, "the default and three"
    assert outcome.comparison is not None and benches.left_alone == 1
    assert {place for place, _, turn in benches.begun if turn > 0} == {1}


def test_where_every_device_fails_all_go_on() -> None:
    def broken(values: Mapping[str, KnobValue], order: int) -> Measurement:
        if values == SPACE.default_values:
            return SyntheticEngine()(values, order)
        raise TrialFailed("no driver", status=TrialStatus.DEVICE_ERROR)

    benches = ScriptedBenches(broken, num_devices=2)
    outcome, recorded = study(SyntheticEngine(), benches=benches, num_trials=6)
    assert len(recorded) == 13 and outcome.winner is None


@pytest.mark.parametrize("stop_with", [KeyboardInterrupt, OutOfTime])
def test_a_stop_ends_every_device_and_resume_does_what_is_missing(
    stop_with: type[BaseException],
) -> None:
    engine = SyntheticEngine(stop_after=7, stop_with=stop_with)
    benches = ScriptedBenches(engine, num_devices=3)
    outcome, first = study(engine, benches=benches, num_trials=5)
    cut = [trial for trial in first if trial.status is TrialStatus.INTERRUPTED]
    assert {trial.device for trial in cut} == {"test:0", "test:1", "test:2"} and len(cut) == 3
    assert outcome.interrupted is (stop_with is KeyboardInterrupt)
    again = ScriptedBenches(SyntheticEngine(), num_devices=2)
    _, second = study(SyntheticEngine(), first, benches=again, num_trials=5)
    numbers = [trial.number for trial in [*first, *second]]
    assert numbers == [*range(len(numbers))]
    done = [t for t in [*first, *second] if t.status is not TrialStatus.INTERRUPTED]
    assert [sum(t.arm == arm for t in done) for arm in ("default", "bayes", "random")] == [1, 5, 5]


def test_a_trial_says_when_it_began() -> None:
    benches = ScriptedBenches(SyntheticEngine(), num_devices=2)
    _, recorded = study(SyntheticEngine(), benches=benches, num_trials=2)
    assert recorded[0].started_at == 1.0
    assert {trial.started_at for trial in recorded[1:3]} == {3.0, 4.0}


@pytest.mark.parametrize("num_kills", [1, 2])
def test_a_window_of_the_test_that_somebody_killed_is_measured_again(num_kills: int) -> None:
    class Killed(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            measured = super().__call__(values, order)
            if order == 9 and values != SPACE.default_values and self.orders.count(-9) < num_kills:
                self.orders.append(-9)
                raise TrialFailed("it was killed", status=TrialStatus.INTERRUPTED)
            return measured

    outcome, _ = study(Killed())
    expected = DecisionReason.ACCEPTED if num_kills == 1 else DecisionReason.MISSING_DATA
    assert reason_of(outcome) is expected


def test_a_default_that_somebody_killed_is_no_default() -> None:
    class Killed(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue], order: int) -> Measurement:
            raise TrialFailed("it was killed", status=TrialStatus.INTERRUPTED)

    outcome, recorded = study(Killed())
    assert not outcome.default_ran and len(recorded) == 1
    _, again = study(SyntheticEngine(), recorded, num_trials=1)
    assert again[0].arm == "default" and again[0].status is TrialStatus.OK


def test_what_a_profile_of_this_place_says_is_the_first_trial_of_the_search() -> None:
    first = SPACE.default_values | {"max_num_active_seqs": 8}
    benches = ScriptedBenches(SyntheticEngine(), num_devices=3)
    recorded: list[TrialResult] = []
    run_study(
        benches,
        plan=replace(plan(num_trials=3), first=first),
        record=recorded.append,
        record_window=lambda window: None,
    )
    assert [values == first for _, values, _ in benches.begun[:4]] == [False, False, True, False]
    assert [trial.arm for trial in recorded].count("bayes") == 3
