"""``sparsed bench``; every verb is a module of its own."""

from __future__ import annotations

import typer

from sparsed.controller.cli.bench_cache import cache
from sparsed.controller.cli.bench_decode import decode
from sparsed.controller.cli.bench_kernels import kernels
from sparsed.controller.cli.bench_link import link
from sparsed.controller.cli.bench_serve import serve

app = typer.Typer(help="Measure a server, the engine, or this machine.", no_args_is_help=True)
app.command("cache")(cache)
app.command("decode")(decode)
app.command("kernels")(kernels)
app.command("link")(link)
app.command("serve")(serve)


@app.callback()
def _group() -> None:
    """Measure a server, the engine, or this machine."""
