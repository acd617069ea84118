"""``sparsed model fetch|list``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from sparsed.controller.cli.output import Output, OutputOption, gib, print_json, print_table
from sparsed.controller.cli.progress import ProgressLine
from sparsed.controller.config import BUILTIN_MODEL
from sparsed.controller.state_dir import resolve_cache_dir

app = typer.Typer(help="Models on this machine.", no_args_is_help=True)


@app.command()
def fetch(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A built-in name or a hub id.")
    ] = BUILTIN_MODEL,
) -> None:
    """Fetch a model into the cache, check it, and print where it is."""
    from sparsed.engine.models.catalog import resolve_model

    found = resolve_model(model, cache_dir=resolve_cache_dir(os.environ), progress=ProgressLine())
    print(found.path or found.model_id)


@app.command("list")
def list_(output: OutputOption = Output.TEXT) -> None:
    """Show built-in models, converted files and dummies; one without a path is not here yet."""
    from sparsed.engine.models.catalog import list_models

    models = list_models(resolve_cache_dir(os.environ))
    if output is Output.JSON:
        print_json(list(models))
    else:
        print_table(
            ("model", "kind", "size", "path"),
            ((model.name, model.kind, gib(model.num_bytes), model.path) for model in models),
        )
