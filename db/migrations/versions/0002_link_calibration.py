"""Calibrations of the link between the tiers."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "link_calibration",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("gpu_name", sa.String(), nullable=False),
        sa.Column("driver", sa.String(), nullable=False),
        sa.Column("link", sa.String(), nullable=False),
        sa.Column("torch", sa.String(), nullable=False),
        sa.Column("triton", sa.String(), nullable=False),
        sa.Column("h2d_bytes_per_s", sa.Double(), nullable=False),
        sa.Column("d2h_bytes_per_s", sa.Double(), nullable=False),
        sa.Column("entries", sa.JSON(), nullable=False),
        sa.Column("measured_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_link_calibration")),
        sa.UniqueConstraint("sha256", name=op.f("uq_link_calibration_sha256")),
    )
