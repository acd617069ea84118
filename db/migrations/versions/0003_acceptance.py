"""Decisions of acceptance tests, with the windows they rest on."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "acceptance",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("hardware_id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=True),
        sa.Column("config_from_id", sa.Integer(), nullable=False),
        sa.Column("config_to_id", sa.Integer(), nullable=False),
        sa.Column("rule", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("n_pairs", sa.Integer(), nullable=False),
        sa.Column("hl", sa.Double(), nullable=True),
        sa.Column("ci_lo", sa.Double(), nullable=True),
        sa.Column("ci_hi", sa.Double(), nullable=True),
        sa.Column("p", sa.Double(), nullable=True),
        sa.Column("cv", sa.Double(), nullable=True),
        sa.Column("loss_bounds", sa.JSON(), nullable=False),
        sa.Column("initiated_by", sa.String(), nullable=False),
        sa.Column("decided_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["config_from_id"], ["config.id"], name=op.f("fk_acceptance_config_from_id_config")
        ),
        sa.ForeignKeyConstraint(
            ["config_to_id"], ["config.id"], name=op.f("fk_acceptance_config_to_id_config")
        ),
        sa.ForeignKeyConstraint(
            ["hardware_id"], ["hardware.id"], name=op.f("fk_acceptance_hardware_id_hardware")
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["model.id"], name=op.f("fk_acceptance_model_id_model")
        ),
        sa.ForeignKeyConstraint(
            ["study_id"], ["study.id"], name=op.f("fk_acceptance_study_id_study")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_acceptance")),
    )
    with op.batch_alter_table("acceptance", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_acceptance_hardware_id"), ["hardware_id", "model_id"], unique=False
        )

    op.create_table(
        "acceptance_window",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("acceptance_id", sa.Integer(), nullable=False),
        sa.Column("config_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("arrival_order", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["acceptance_id"],
            ["acceptance.id"],
            name=op.f("fk_acceptance_window_acceptance_id_acceptance"),
        ),
        sa.ForeignKeyConstraint(
            ["config_id"], ["config.id"], name=op.f("fk_acceptance_window_config_id_config")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_acceptance_window")),
        sa.UniqueConstraint(
            "acceptance_id", "number", name=op.f("uq_acceptance_window_acceptance_id_number")
        ),
    )
