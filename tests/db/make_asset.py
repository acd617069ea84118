"""Writes the database of the newest revision into ``assets/``; run once per released schema.

PYTHONPATH=src python tests/db/make_asset.py
"""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

from sparsed.core import (
    AcceptanceDecision,
    AcceptanceRule,
    AcceptanceVerdict,
    AcceptanceWindow,
    CopyPath,
    Decision,
    DecisionReason,
    DecisionState,
    Direction,
    Guard,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
    ModelShape,
    Objective,
    Profile,
    ProfileKey,
    ProfileStatus,
    Regime,
    RolloutReason,
    RolloutRecord,
    RolloutState,
    Slo,
    TrialResult,
    TrialStatus,
    TunerControls,
    WindowStage,
    Workload,
    WorkloadRequest,
)
from sparsed.db import open_store

ASSETS = Path(__file__).parent / "assets"
KEY = ProfileKey(hardware="cpu:asset:2:4GiB", model="smollm2-135m", dtype="float32")

SHAPE = ModelShape(
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
    max_position=8192,
    num_parameters=134515008,
    tied_embeddings=True,
)

CALIBRATION = LinkCalibration(
    key=LinkKey(gpu_name="asset", driver="1", link="gen5x16", torch="2", triton="3"),
    contiguous=LinkProbe(h2d_bytes_per_s=5e10, d2h_bytes_per_s=4e10),
    entries=(
        LinkEntry(
            direction=Direction.H2D,
            piece_bytes=16384,
            path=CopyPath.KERNEL,
            programs=16,
            tile_bytes=32768,
            bytes_per_s=4.8e10,
            slowdown=1.1,
        ),
    ),
    measured_at=1.0,
)

ACCEPTANCE = AcceptanceDecision(
    key=KEY,
    config_from={"token_budget": 2048},
    config_to={"token_budget": 1024},
    rule=AcceptanceRule(targets={Guard.TPOT: 0.05}),
    verdict=AcceptanceVerdict(
        state=DecisionState.HELD, reason=DecisionReason.NOT_ENOUGH, num_pairs=0
    ),
    windows=(
        AcceptanceWindow(
            number=0,
            stage=WindowStage.TEST,
            round=0,
            order=1,
            values={"token_budget": 2048},
            status=TrialStatus.OK,
            metrics={"goodput_requests_per_s": 2.0, "quality": None},
            started_at=1.0,
            ended_at=2.0,
        ),
    ),
    initiated_by="asset",
    decided_at=3.0,
)

ROLLOUT = RolloutRecord(
    state=RolloutState.VERIFYING,
    reason=RolloutReason.CANARY,
    config_from={"token_budget": 1024},
    config_to={"token_budget": 1536},
    initiated_by="asset",
    at=1.0,
)
COMMIT = replace(
    ROLLOUT,
    reason=RolloutReason.COMMITTED,
    at=2.0,
    regime_id=1,
    profile="profile #1 on sparsed 0.1.0",
)

REGIME = Regime(
    regime_id=1,
    centroid={"requests_per_s": 0.5, "input_tokens_p50": 9.0},
    signature="asset",
    seen_s=900.0,
    seen_at=2.0,
    incumbent=COMMIT.config_to,
    verified_at=2.0,
    versions={"torch": "2"},
)


def fill(path: Path) -> None:
    """One row of everything a user would miss."""
    store = open_store(path)
    study = store.start_study(
        KEY,
        workload=Workload(
            name="chat",
            requests=(WorkloadRequest(arrival_s=0.0, input_tokens=8, output_tokens=4),),
        ),
        objective=Objective.THROUGHPUT,
        slo=Slo(min_recall=0.5),
        seed=1,
        space={"token_budget": [512, 1024]},
        versions={"sparsed": "0.1.0"},
        started_at=1.0,
    )
    store.record_trial(
        study,
        TrialResult(
            number=0,
            arm="default",
            values={"token_budget": 1024},
            status=TrialStatus.OK,
            score=2.0,
            spread_frac=0.1,
            metrics={"duration_s": 3.0},
            device="cuda:1",
        ),
    )
    store.save_profile(
        Profile(
            key=KEY,
            values={"token_budget": 1024, "hbm_budget": None},
            status=ProfileStatus.VERIFIED,
            workload="chat",
            objective=Objective.THROUGHPUT,
            default_scores=(1.0,),
            winner_scores=(2.0,),
            versions={"sparsed": "0.1.0"},
            created_at=1.0,
            pinned=True,
            shape=SHAPE,
        )
    )
    decision = Decision(
        made_at=1.0,
        values={"token_budget": 512},
        reason="asset",
        predicted_score=1.0,
        current_score=1.0,
    )
    store.record_decision(KEY, decision)
    store.save_calibration(CALIBRATION)
    store.save_acceptance(ACCEPTANCE)
    store.mark_rollout(KEY, ROLLOUT)
    store.settle_rollout(
        KEY, COMMIT, good=COMMIT.config_to, versions=REGIME.versions, regime=REGIME
    )
    store.begin_run(2.0)
    store.keep_controls(TunerControls(pins=("prefill_chunk",), frozen=True))
    store.close()


def main() -> None:
    scratch = ASSETS / "scratch.db"
    fill(scratch)
    with sqlite3.connect(scratch) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        (ASSETS / f"{revision}.sql").write_text("\n".join(connection.iterdump()) + "\n")
    connection.close()
    for left_over in ASSETS.glob("scratch.db*"):
        left_over.unlink()


if __name__ == "__main__":
    main()
