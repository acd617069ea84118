"""Whole studies on a synthetic engine: a landscape with a memory cliff, noise and targets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from sparsed.core import (
    Knobs,
    KnobValue,
    Measurement,
    Objective,
    SearchMethod,
    Slo,
    TrialResult,
    TrialStatus,
)
from sparsed.tuner.objective import TrialFailed
from sparsed.tuner.offline import StudyOutcome, StudyPlan, run_study
from sparsed.tuner.space import build_space

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

    def __init__(self, *, noise_frac: float = 0.0, stop_after: int | None = None) -> None:
        self.calls: list[Mapping[str, KnobValue]] = []
        self.noise_frac = noise_frac
        self.stop_after = stop_after
        self._generator = random.Random(0)

    def __call__(self, values: Mapping[str, KnobValue]) -> Measurement:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(values)
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
    engine: SyntheticEngine, previous: Sequence[TrialResult] = (), **changes: object
) -> tuple[StudyOutcome, list[TrialResult]]:
    recorded: list[TrialResult] = []
    outcome = run_study(
        engine,
        plan=plan(**changes),  # type: ignore[arg-type]  # fields by name
        record=recorded.append,
        previous=previous,
    )
    return outcome, recorded


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
    assert [trial.arm for trial in recorded if trial.arm != "verify"] == ["default", *arms * 2]
    values = [tuple(trial.values.items()) for trial in recorded if trial.arm in arms]
    assert len(set(values)) == len(values)


def test_a_study_compares_both_arms_and_verifies_the_winner() -> None:
    outcome, recorded = study(SyntheticEngine(noise_frac=0.01))
    assert [trial.number for trial in recorded] == [*range(21)]
    arms = [trial.arm for trial in recorded]
    assert arms == ["default", *["bayes", "random"] * 5, *["verify"] * 10]
    assert recorded[0].values == SPACE.default_values
    assert all(trial.spread_frac is not None for trial in recorded[:11] if trial.score)
    assert outcome.winner is not None
    assert outcome.winner.score == max(trial.score or 0 for trial in outcome.best.values())
    assert len(outcome.default_scores) == len(outcome.winner_scores) == 5
    assert min(outcome.winner_scores) > sorted(outcome.default_scores)[2]
    order = [trial.reason for trial in recorded[11:]]
    winner = f"of {outcome.winner.arm}"
    assert order == ["of default", winner, winner, "of default"] * 2 + ["of default", winner]


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
    floor = recorded[0].metrics["attention_recall"] - 0.05
    for trial in recorded:
        recall = trial.metrics.get("attention_recall", 1.0)
        assert (recall < floor) == (trial.status is TrialStatus.RECALL_BROKEN)
    assert any(trial.status is TrialStatus.RECALL_BROKEN for trial in recorded)


def test_a_dense_default_sets_a_floor_too() -> None:
    class DenseByDefault(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue]) -> Measurement:
            measured = super().__call__(values)
            if DEFAULT.with_values(values).token_budget >= DEFAULT.token_budget:
                return replace(measured, attention_recall=None, sparse_steps=0)
            return replace(measured, attention_recall=0.5)

    outcome, recorded = study(DenseByDefault(), num_trials=8)
    assert any(trial.status is TrialStatus.RECALL_BROKEN for trial in recorded)
    assert all(trial.metrics.get("attention_recall") != 0.5 for trial in outcome.best.values())


@pytest.mark.parametrize("slo", [Slo(), Slo(min_recall=0.5)])
def test_an_unsampled_candidate_never_wins(slo: Slo) -> None:
    class Unsampled(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue]) -> Measurement:
            measured = super().__call__(values)
            is_default = values == SPACE.default_values
            return measured if is_default else replace(measured, attention_recall=None)

    outcome, recorded = study(Unsampled(), slo=slo)
    assert outcome.winner is None and set(outcome.best) == {"default"}
    unchecked = [trial for trial in recorded if "never sampled" in trial.reason]
    assert unchecked and all(trial.status is TrialStatus.RECALL_BROKEN for trial in unchecked)


def test_noise_alone_is_not_verified() -> None:
    class Flat(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue]) -> Measurement:
            return super().__call__(SPACE.default_values)

    outcome, _ = study(Flat(noise_frac=0.2))
    assert outcome.winner is None
    assert "does not beat" in outcome.reason or "nothing scored above" in outcome.reason


def test_a_default_that_cannot_run_ends_the_study() -> None:
    class Broken(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue]) -> Measurement:
            raise TrialFailed("no memory", status=TrialStatus.OUT_OF_MEMORY)

    outcome, recorded = study(Broken())
    assert (outcome.winner, len(recorded)) == (None, 1)
    assert outcome.reason == "the default configuration failed: no memory"


def test_a_default_outside_its_targets_can_be_replaced() -> None:
    outcome, recorded = study(SyntheticEngine(), slo=Slo(tpot_s=0.02), num_trials=12)
    assert recorded[0].status is TrialStatus.SLO_BROKEN
    assert outcome.winner is not None
    assert outcome.default_scores == ()


def test_a_winner_that_breaks_in_verification_is_dropped() -> None:
    class Fragile(SyntheticEngine):
        def __call__(self, values: Mapping[str, KnobValue]) -> Measurement:
            if len(self.calls) > 24 and values != SPACE.default_values:
                raise TrialFailed("died", status=TrialStatus.ENGINE_ERROR)
            return super().__call__(values)

    outcome, recorded = study(Fragile())
    assert outcome.winner is None
    assert "broke its targets" in outcome.reason
    assert recorded[-1].status is TrialStatus.ENGINE_ERROR


@pytest.mark.parametrize("stop_after", [0, 1, 7, 15])
def test_ctrl_c_keeps_what_was_measured_and_resume_ends_the_same(stop_after: int) -> None:
    whole, all_trials = study(SyntheticEngine())
    outcome, first = study(SyntheticEngine(stop_after=stop_after))
    assert outcome.interrupted and outcome.winner is None
    assert first[-1].status is TrialStatus.INTERRUPTED
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

    tuned = [key(trial) for trial in finished if trial.arm != "verify"]
    assert tuned == [key(trial) for trial in all_trials if trial.arm != "verify"]


def test_the_seed_decides_the_study() -> None:
    def values(seed: int) -> list[Mapping[str, KnobValue]]:
        return [trial.values for trial in study(SyntheticEngine(), seed=seed)[1]]

    assert values(1) == values(1)
    assert values(1) != values(2)
