"""What `sparsed tune` refuses before it measures, and what it prints."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from sparsed.controller.config import DaemonConfig, load_config
from sparsed.controller.state_dir import StateLock
from sparsed.controller.tune_options import TuneOptions
from sparsed.controller.tuning import run_tune
from sparsed.controller.tuning_report import StudyProgress, print_outcome
from sparsed.core import (
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    DecisionReason,
    DecisionState,
    ExitCode,
    InputError,
    Knobs,
    Objective,
    Slo,
    StartError,
    TrialResult,
    TrialStatus,
    WindowStage,
)
from sparsed.tuner.offline import StudyOutcome, StudyPlan
from sparsed.tuner.space import build_space
from sparsed.tuner.verification import Comparison

KNOBS = Knobs(
    token_budget=2048,
    hbm_budget=None,
    max_num_active_seqs=4,
    prefill_chunk=512,
    page_size=32,
    sparse_method="cuboid-mean",
    dense_layers=0,
    max_num_seqs=16,
    kv_hbm_gib=1.0,
    kv_dram_gib=1.0,
    max_model_len=8192,
)


def config(tmp_path: Path, **flags: object) -> DaemonConfig:
    given = {"model": "dummy:tiny", "state_dir": tmp_path / "state", "device": "cpu"}
    return load_config(flags=given | flags, environment={})


def trial(
    number: int,
    arm: str,
    score: float | None,
    reason: str = "",
    metrics: Mapping[str, float] | None = None,
) -> TrialResult:
    return TrialResult(
        number=number,
        arm=arm,
        values={"token_budget": 1024, "hbm_budget": None},
        status=TrialStatus.OK if score else TrialStatus.OUT_OF_MEMORY,
        score=score,
        spread_frac=0.015 if score else None,
        metrics=metrics or {},
        reason=reason,
    )


def window(stage: WindowStage, status: TrialStatus, tokens_per_s: float) -> AcceptanceWindow:
    return AcceptanceWindow(
        number=0,
        stage=stage,
        round=0,
        order=1,
        values={"token_budget": 512},
        status=status,
        metrics={"output_tokens_per_s": tokens_per_s},
    )


def test_beside_a_daemon_it_points_to_the_live_tuner(tmp_path: Path) -> None:
    options = TuneOptions(config=config(tmp_path), workload="chat", trials=1)
    with (
        StateLock(options.config.state_dir, verb="start"),
        pytest.raises(StartError, match="sparsed tuner advise") as caught,
    ):
        run_tune(options)
    assert caught.value.code is ExitCode.TEMPORARY


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"workload": "chatt"}, "workload"),
        ({"objective": Objective.GOODPUT}, "objective"),
        ({"export": Path("out.txt")}, "export"),
        ({"export": Path("no/such/place.toml")}, "export"),
        ({"output_dir": Path("/dev/null/place")}, "output-dir"),
    ],
)
def test_bad_options_are_named_before_anything_starts(
    tmp_path: Path, changes: dict[str, object], field: str
) -> None:
    fields: dict[str, object] = {"config": config(tmp_path), "workload": "chat", "trials": 1}
    with pytest.raises(InputError) as caught:
        run_tune(TuneOptions(**(fields | changes)))  # type: ignore[arg-type]  # fields by name
    assert caught.value.field == field
    assert not (tmp_path / "state").exists()


def test_the_bar_says_the_best_and_every_trial() -> None:
    text = io.StringIO()
    plan = StudyPlan(
        space=build_space(KNOBS, auto_hbm_budget=4096),
        objective=Objective.THROUGHPUT,
        slo=Slo(),
        num_trials=1,
        seed=0,
    )
    with StudyProgress(
        Console(file=text, width=200), plan=plan, devices=["cpu"], previous=()
    ) as progress:
        progress.show(trial(0, "default", 10.0, metrics={"attention_recall": 0.0}))
        progress.show(trial(1, "bayes", None, "the hot tier is full"))
        progress.show(trial(2, "random", 9.0, "so", {"sparse_steps": 0.0}))
        progress.show(trial(3, "random", None, "so", {"sparse_steps": 7.0}))
        progress.show_window(window(WindowStage.RANK, TrialStatus.OK, 99.0))
        progress.show_window(window(WindowStage.TEST, TrialStatus.SLO_BROKEN, 98.0))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    knobs = "token_budget=1024, hbm_budget=auto"
    assert f"   0 default 10 tokens/s, recall 0.000  {knobs}" in lines
    assert f"   1 bayes   out_of_memory (the hot tier is full)  {knobs}" in lines
    assert f"   2 random  9 tokens/s, nothing sparse (so)  {knobs}" in lines
    assert f"   3 random  out_of_memory, recall not sampled (so)  {knobs}" in lines
    assert "     rank round  1  99 tokens/s  token_budget=512" in lines
    assert "     test pair  1  slo_broken  token_budget=512" in lines
    assert "verifying, pair 1" in lines[-1] and "6/87" in lines[-1]


def test_the_table_has_every_arm_and_the_verification() -> None:
    text = io.StringIO()
    outcome = StudyOutcome(
        default=trial(0, "default", 10.0),
        best={
            "default": trial(0, "default", 10.0),
            "bayes": trial(1, "bayes", 12.0),
            "random": trial(2, "random", 11.0),
        },
        winner=trial(1, "bayes", 12.0),
        reason="accepted: so it is",
        comparison=Comparison(
            config_from={"token_budget": 2048},
            config_to={"token_budget": 512},
            rule=AcceptanceRule(metric="output_tokens_per_s"),
            verdict=AcceptanceVerdict(
                state=DecisionState.ACCEPTED, reason=DecisionReason.ACCEPTED, num_pairs=32
            ),
            windows=tuple(
                window(WindowStage.TEST, TrialStatus.OK, score) for score in (12.0, 11.5, 13.0)
            ),
        ),
    )
    print_outcome(Console(file=text, width=160), outcome, objective=Objective.GOODPUT)
    printed = text.getvalue()
    for words in (
        "requests/s",
        "best of random",
        "best of Bayesian",
        "1.5%",
        "3 runs, worst 11.5",
        "12.5%",
        "accepted: so it is",
    ):
        assert words in printed


@pytest.mark.parametrize("sparse_steps", [0.0, 5.0])
def test_a_winner_that_was_never_sparse_is_marked(sparse_steps: float) -> None:
    text = io.StringIO()
    winner = trial(1, "bayes", 12.0, metrics={"sparse_steps": sparse_steps})
    outcome = StudyOutcome(
        default=trial(0, "default", 10.0), best={"bayes": winner}, winner=winner, reason="verified"
    )
    print_outcome(Console(file=text, width=160), outcome, objective=Objective.THROUGHPUT)
    assert ("nothing is known of its attention recall" in text.getvalue()) == (not sparse_steps)
