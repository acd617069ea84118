"""The sizes of the model that a profile was tuned for, and which profile a candidate came from."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("profile", sa.Column("shape", sa.JSON(), nullable=True))
    op.add_column("rollout", sa.Column("profile", sa.String(), nullable=True))
