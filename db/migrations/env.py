"""Runs the revisions on the connection that ``migrate.upgrade`` handed over."""

from alembic import context

from sparsed.db.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
