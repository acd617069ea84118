"""``sparsed bench``; every verb is a module of its own."""

from __future__ import annotations

import typer

from sparsed.controller.cli.bench_link import link
from sparsed.controller.cli.bench_serve import serve

app = typer.Typer(help="Measure a server, or this machine.", no_args_is_help=True)
app.command("link")(link)
app.command("serve")(serve)


@app.callback()
def _group() -> None:
    """Measure a server, or this machine."""
