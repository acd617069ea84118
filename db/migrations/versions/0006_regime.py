"""Regimes of the live tuner with their incumbents, and what its values were verified on."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "regime",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("hardware_id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("centroid", sa.JSON(), nullable=False),
        sa.Column("signature", sa.String(), nullable=False),
        sa.Column("seen_s", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("config_id", sa.Integer(), nullable=True),
        sa.Column("verified_at", sa.Double(), nullable=True),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["hardware_id"], ["hardware.id"], name=op.f("fk_regime_hardware_id_hardware")
        ),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_regime_model_id_model")),
        sa.ForeignKeyConstraint(
            ["config_id"], ["config.id"], name=op.f("fk_regime_config_id_config")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_regime")),
        sa.UniqueConstraint(
            "hardware_id", "model_id", "number", name=op.f("uq_regime_hardware_id_model_id_number")
        ),
    )
    op.add_column("rollout", sa.Column("regime_number", sa.Integer(), nullable=True))
    op.add_column("last_known_good", sa.Column("versions", sa.JSON(), nullable=True))
