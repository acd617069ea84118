"""``sparsed plan``: what would fit on a GPU and how fast it would be, without one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed.controller.cli.bench_engine import choose_flags
from sparsed.controller.cli.flags import takes
from sparsed.controller.cli.output import Output, OutputOption, print_json, print_table
from sparsed.controller.cli.progress import ProgressLine
from sparsed.controller.config import load_config

if TYPE_CHECKING:
    from sparsed.controller.plan.report import Plan

GpuOption = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME",
        help="h100 (measured), h200, a100-80gb, a100-40gb, l40s, rtx-4090 (data sheets). Default: "
        "the GPU of this machine, if it is one of these.",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        min=1,
        help="Prompt of each request. Default: 32768, or what the model has room for.",
    ),
]
OutputTokensOption = Annotated[
    int, typer.Option("--output-tokens", metavar="TOKENS", min=1, help="Output of each request.")
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate", metavar="R", help="Requests per second, Poisson. Default: as many as fit at once."
    ),
]
MissFracOption = Annotated[
    float,
    typer.Option(
        "--miss-frac",
        metavar="SHARE",
        help="Selected pages that are missed with as many slots as are selected.",
    ),
]
PLAN_FLAGS = choose_flags(
    "model",
    "state_dir",
    "dtype",
    "slo_ttft_ms",
    "slo_tpot_ms",
    "sparse_method",
    "token_budget",
    "page_size",
    "prefill_chunk",
    "max_num_seqs",
    "kv_hbm_gib",
    "kv_dram_gib",
    prefill_chunk="the best of 512 to 8192",
    sparse_method="dense and mean-key, side by side",
)


@takes(*PLAN_FLAGS)
def plan(
    gpu: GpuOption = None,
    context: ContextOption = None,
    output_tokens: OutputTokensOption = 256,
    rate: RateOption = None,
    miss_frac: MissFracOption = 0.3,
    output: OutputOption = Output.TEXT,
    **flags: str | bool | None,
) -> None:
    """Predict what fits, how fast it is and what binds, and recommend knobs; needs no GPU.

    An analytic model, not a measurement: docs/performance.md tells its error. Targets are never
    relaxed: where nothing meets them the closest point and what binds it are told, and the exit
    status is 69.
    """
    from sparsed.controller.plan.request import PlanOptions
    from sparsed.controller.plan.request import plan as make
    from sparsed.controller.plan.search import exit_code

    found = make(
        load_config(flags=flags, environment=os.environ),
        PlanOptions(
            gpu=gpu,
            context=context,
            output_tokens=output_tokens,
            rate_per_s=rate,
            miss_frac=miss_frac,
        ),
        on_progress=ProgressLine(only_terminal=output is Output.JSON),
    )
    if output is Output.JSON:
        print_json(found)
    else:
        _print(found)
    if code := exit_code(found.choice):
        raise typer.Exit(code)


def _print(found: Plan) -> None:
    from sparsed.controller.plan.report import HEADERS, in_words, limit_rows, table_rows

    traffic = found.traffic
    arrivals = (
        "as many as fit" if traffic.rate_per_s is None else f"{traffic.rate_per_s:g} a second"
    )
    print(
        f"{found.model}, {found.dtype} on {found.gpu.name}: {traffic.context:,} + "
        f"{traffic.output_tokens:,} tokens, {arrivals}"
    )
    if found.choice.by_method:
        print_table(HEADERS, table_rows(found.choice))
        print_table(
            ("attention", "by HBM", "by DRAM", "by link", "rows", "binds"),
            limit_rows(found.choice),
        )
    print(*in_words(found), sep="\n")
