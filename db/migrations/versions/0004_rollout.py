"""Candidates of the live tuner, its last known good, and what operators laid down for it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _key_columns(table: str) -> tuple[sa.schema.SchemaItem, ...]:
    return (
        sa.Column("hardware_id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["hardware_id"], ["hardware.id"], name=op.f(f"fk_{table}_hardware_id_hardware")
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model.id"], name=op.f(f"fk_{table}_model_id_model")
        ),
    )


def _config(table: str, column: str) -> tuple[sa.schema.SchemaItem, ...]:
    return (
        sa.Column(column, sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint([column], ["config.id"], name=op.f(f"fk_{table}_{column}_config")),
    )


def _id(table: str) -> tuple[sa.schema.SchemaItem, ...]:
    return (
        sa.Column("id", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
    )


def upgrade() -> None:
    op.create_table(
        "rollout",
        *_id("rollout"),
        *_key_columns("rollout"),
        *_config("rollout", "config_from_id"),
        *_config("rollout", "config_to_id"),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("initiated_by", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
    )
    op.create_index(op.f("ix_rollout_hardware_id"), "rollout", ["hardware_id", "model_id"])
    op.create_table(
        "tuner_marker",
        *_id("tuner_marker"),
        *_key_columns("tuner_marker"),
        sa.Column("rollout_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["rollout_id"], ["rollout.id"], name=op.f("fk_tuner_marker_rollout_id_rollout")
        ),
        sa.UniqueConstraint(
            "hardware_id", "model_id", name=op.f("uq_tuner_marker_hardware_id_model_id")
        ),
    )
    op.create_table(
        "last_known_good",
        *_id("last_known_good"),
        *_key_columns("last_known_good"),
        *_config("last_known_good", "config_id"),
        sa.Column("moved_at", sa.Double(), nullable=False),
    )
    op.create_index(
        op.f("ix_last_known_good_hardware_id"), "last_known_good", ["hardware_id", "model_id"]
    )
    op.create_table(
        "tuner_run",
        *_id("tuner_run"),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("alive_at", sa.Double(), nullable=False),
        sa.Column("ended", sa.Boolean(), nullable=False),
    )
    op.create_table(
        "tuner_control",
        *_id("tuner_control"),
        sa.Column("pins", sa.JSON(), nullable=False),
        sa.Column("frozen", sa.Boolean(), nullable=False),
        sa.Column("safe_since", sa.Double(), nullable=True),
    )
