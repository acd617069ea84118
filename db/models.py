"""The tables: columns, constraints, a naming convention. No queries.

Times are seconds since the epoch, durations seconds; JSON columns hold plain values only.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import JSON, Double, ForeignKey, Index, MetaData, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING_CONVENTION = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map: ClassVar[dict[Any, Any]] = {float: Double}


class HardwareRow(Base):
    __tablename__ = "hardware"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String, unique=True)


class SoftwareRow(Base):
    __tablename__ = "software"

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    versions: Mapped[dict[str, Any]] = mapped_column(JSON)


class ModelRow(Base):
    __tablename__ = "model"
    __table_args__ = (UniqueConstraint("name", "dtype"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    dtype: Mapped[str]


class WorkloadRow(Base):
    __tablename__ = "workload"

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str]
    requests: Mapped[list[Any]] = mapped_column(JSON)  # [arrival_s, input, output tokens]


class ConfigRow(Base):
    __tablename__ = "config"

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    values: Mapped[dict[str, Any]] = mapped_column(JSON)


class StudyRow(Base):
    __tablename__ = "study"
    __table_args__ = (Index(None, "hardware_id", "model_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    software_id: Mapped[int] = mapped_column(ForeignKey("software.id"))
    workload_id: Mapped[int] = mapped_column(ForeignKey("workload.id"))
    objective: Mapped[str]
    slo: Mapped[dict[str, Any]] = mapped_column(JSON)
    space: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # since 0004
    seed: Mapped[int]
    started_at: Mapped[float]


class TrialRow(Base):
    __tablename__ = "trial"
    __table_args__ = (UniqueConstraint("study_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id"))
    config_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    number: Mapped[int]
    arm: Mapped[str]
    status: Mapped[str]
    score: Mapped[float | None]
    spread_frac: Mapped[float | None]
    reason: Mapped[str]
    device: Mapped[str | None]  # since 0008
    started_at: Mapped[float]
    ended_at: Mapped[float]


class TrialMetricRow(Base):
    __tablename__ = "trial_metric"
    __table_args__ = (UniqueConstraint("trial_id", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    trial_id: Mapped[int] = mapped_column(ForeignKey("trial.id"))
    name: Mapped[str]
    value: Mapped[float]


class ProfileRow(Base):
    __tablename__ = "profile"
    __table_args__ = (Index(None, "hardware_id", "model_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    software_id: Mapped[int] = mapped_column(ForeignKey("software.id"))
    config_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    status: Mapped[str]
    workload: Mapped[str]
    objective: Mapped[str]
    default_scores: Mapped[list[Any]] = mapped_column(JSON)
    winner_scores: Mapped[list[Any]] = mapped_column(JSON)
    created_at: Mapped[float]
    pinned: Mapped[bool]
    shape: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class LinkCalibrationRow(Base):
    __tablename__ = "link_calibration"

    id: Mapped[int] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)  # of the five that follow
    gpu_name: Mapped[str]
    driver: Mapped[str]
    link: Mapped[str]
    torch: Mapped[str]
    triton: Mapped[str]
    h2d_bytes_per_s: Mapped[float]
    d2h_bytes_per_s: Mapped[float]
    entries: Mapped[list[Any]] = mapped_column(JSON)  # LinkEntry by field
    measured_at: Mapped[float]


class RollupRow(Base):
    __tablename__ = "rollup"
    __table_args__ = (Index(None, "period_s", "started_at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    period_s: Mapped[int]
    started_at: Mapped[float]
    metric: Mapped[str]
    num_samples: Mapped[int]
    mean: Mapped[float]
    p50: Mapped[float]
    p95: Mapped[float]


class AcceptanceRow(Base):
    """Verdicts are in logarithms of ratios, as in the vocabulary."""

    __tablename__ = "acceptance"
    __table_args__ = (Index(None, "hardware_id", "model_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    study_id: Mapped[int | None] = mapped_column(ForeignKey("study.id"))
    config_from_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    config_to_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    rule: Mapped[dict[str, Any]] = mapped_column(JSON)  # AcceptanceRule by field
    state: Mapped[str]
    reason: Mapped[str]
    n_pairs: Mapped[int]
    hl: Mapped[float | None]
    ci_lo: Mapped[float | None]
    ci_hi: Mapped[float | None]
    p: Mapped[float | None]
    cv: Mapped[float | None]
    loss_bounds: Mapped[dict[str, Any]] = mapped_column(JSON)  # by guard
    initiated_by: Mapped[str]
    decided_at: Mapped[float]


class AcceptanceWindowRow(Base):
    """The evidence of a decision: raw figures."""

    __tablename__ = "acceptance_window"
    __table_args__ = (UniqueConstraint("acceptance_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    acceptance_id: Mapped[int] = mapped_column(ForeignKey("acceptance.id"))
    config_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    number: Mapped[int]
    stage: Mapped[str]
    round: Mapped[int]
    arrival_order: Mapped[int]
    status: Mapped[str]
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)  # by name; null: no such figure
    started_at: Mapped[float]
    ended_at: Mapped[float]


class DecisionRow(Base):
    """Advice of the live tuner."""

    __tablename__ = "decision"
    __table_args__ = (Index(None, "made_at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    config_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    made_at: Mapped[float]
    reason: Mapped[str]
    predicted_score: Mapped[float | None]
    current_score: Mapped[float | None]


class RolloutRow(Base):
    """Steps in the lives of candidates of the live tuner."""

    __tablename__ = "rollout"
    __table_args__ = (Index(None, "hardware_id", "model_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    config_from_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    config_to_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    state: Mapped[str]
    reason: Mapped[str]
    initiated_by: Mapped[str]
    at: Mapped[float]
    regime_number: Mapped[int | None]
    profile: Mapped[str | None]


class TunerMarkerRow(Base):
    """Dirty markers: the step of the candidate that is tested, while it is."""

    __tablename__ = "tuner_marker"
    __table_args__ = (UniqueConstraint("hardware_id", "model_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollout.id"))


class LastKnownGoodRow(Base):
    """The newest of a key holds, older ones are kept to look at."""

    __tablename__ = "last_known_good"
    __table_args__ = (Index(None, "hardware_id", "model_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    config_id: Mapped[int] = mapped_column(ForeignKey("config.id"))
    moved_at: Mapped[float]
    versions: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class RegimeRow(Base):
    """Kinds of load. ``config_id``: what is verified for it, if anything is."""

    __tablename__ = "regime"
    __table_args__ = (UniqueConstraint("hardware_id", "model_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    hardware_id: Mapped[int] = mapped_column(ForeignKey("hardware.id"))
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    number: Mapped[int]
    centroid: Mapped[dict[str, Any]] = mapped_column(JSON)
    signature: Mapped[str]
    seen_s: Mapped[float]
    seen_at: Mapped[float]
    config_id: Mapped[int | None] = mapped_column(ForeignKey("config.id"))
    verified_at: Mapped[float | None]
    versions: Mapped[dict[str, Any]] = mapped_column(JSON)


class TunerRunRow(Base):
    """Times of serving with values of the live tuner."""

    __tablename__ = "tuner_run"

    id: Mapped[int] = mapped_column(primary_key=True)
    started_at: Mapped[float]
    alive_at: Mapped[float]
    ended: Mapped[bool]


class TunerControlRow(Base):
    """At most one row."""

    __tablename__ = "tuner_control"

    id: Mapped[int] = mapped_column(primary_key=True)
    pins: Mapped[list[Any]] = mapped_column(JSON)
    frozen: Mapped[bool]
    safe_since: Mapped[float | None]
