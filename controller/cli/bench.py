"""``sparsed bench``; a further verb is a function with ``@app.command()``."""

from __future__ import annotations

import typer

from sparsed.controller.cli.bench_link import link

app = typer.Typer(help="Measure a server, or this machine.", no_args_is_help=True)
app.command("link")(link)


@app.callback()
def _group() -> None:
    """Measure a server, or this machine."""
