"""``sparsed bench serve``: load on a server, from a distribution or a trace."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed.controller.bench.endpoint import Endpoint
from sparsed.controller.cli.output import Output
from sparsed.core import InputError, Slo, SparseMode

if TYPE_CHECKING:
    from sparsed.controller.bench.lengths import Lengths

DEFAULT_VOCAB_SIZE = 9000
LENGTH_FORMS = "N, LOW:HIGH (uniform) or lognormal:MEDIAN:SIGMA."
SECRETS = ("--api-key", "--url")
TARGET, LOAD, LENGTHS, RESULTS = "Server", "Load", "Lengths and prefixes", "Results"


def serve(
    url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            rich_help_panel=TARGET,
            help="Any OpenAI-compatible server, with or without /v1; USER:PASSWORD@ before the "
            "host is sent as basic authentication, and not kept.",
        ),
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=TARGET, help="Default: the first the server lists."
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="SPARSED_API_KEY",
            rich_help_panel=TARGET,
            help="Sent as a bearer token.",
        ),
    ] = None,
    endpoint: Annotated[
        Endpoint,
        typer.Option(
            rich_help_panel=TARGET,
            help="completions sends token ids, of exact lengths; chat sends that many words.",
        ),
    ] = Endpoint.COMPLETIONS,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            rich_help_panel=TARGET,
            help="Ask for outputs of exactly the planned lengths; not every server knows how.",
        ),
    ] = True,
    sparse_mode: Annotated[
        SparseMode | None,
        typer.Option(rich_help_panel=TARGET, help="Sent as sparse.mode; only sparsed knows it."),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            min=1,
            rich_help_panel=TARGET,
            help="Sent as sparse.token_budget; only sparsed knows it.",
        ),
    ] = None,
    vocab_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=8,
            rich_help_panel=TARGET,
            help="Prompts hold ids from 1000 (for less than 4000: from a quarter on) up to N - 1. "
            "The default is plain text in every model family that sparsed serves.",
        ),
    ] = DEFAULT_VOCAB_SIZE,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=LOAD,
            help="Default: 100, or every row of the trace.",
        ),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            rich_help_panel=LOAD,
            help="Requests per second, arriving at random (Poisson); inf: all at once. Default: "
            "as in the trace, else inf.",
        ),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            metavar="SHAPE",
            rich_help_panel=LOAD,
            help="Gamma shape of the gaps: 1 is Poisson, less is burstier, more is steadier.",
        ),
    ] = 1.0,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=LOAD,
            help="Hold requests back while N are under way; their times start when they are sent.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            rich_help_panel=LOAD,
            help="Arrivals, lengths and prefixes: a line has timestamp (ms), input_length, "
            "output_length and, if known, hash_ids of 512-token blocks; equal ids give equal "
            "tokens. --request-rate, --input-len and --output-len replace their part of it.",
        ),
    ] = None,
    time_scale: Annotated[
        float,
        typer.Option(
            metavar="FACTOR",
            rich_help_panel=LOAD,
            help="Arrival times of the trace are divided by it: 2 is twice the load.",
        ),
    ] = 1.0,
    warmup: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            rich_help_panel=LOAD,
            help="Requests sent together before the measured ones; a run whose token ids the model "
            "does not know ends with them. 0: none, and nothing is found out.",
        ),
    ] = 1,
    timeout_s: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            rich_help_panel=LOAD,
            help="A request that takes longer is an error.",
        ),
    ] = 3600.0,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            rich_help_panel=LOAD,
            help="Equal seeds give equal requests; a server's prefix cache knows them the second "
            "time.",
        ),
    ] = 0,
    input_len: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            rich_help_panel=LENGTHS,
            help=f"{LENGTH_FORMS} Default: 1024, or as in the trace.",
        ),
    ] = None,
    output_len: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            rich_help_panel=LENGTHS,
            help=f"{LENGTH_FORMS} Default: 128, or as in the trace.",
        ),
    ] = None,
    shared_prefix_len: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            min=0,
            rich_help_panel=LENGTHS,
            help="The same tokens before the input of every request, on top of --input-len.",
        ),
    ] = 0,
    max_input_len: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", min=1, rich_help_panel=LENGTHS, help="Clip longer prompts."),
    ] = None,
    max_output_len: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", min=1, rich_help_panel=LENGTHS, help="Clip longer outputs."),
    ] = None,
    slo_ttft_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS", min=0, rich_help_panel=RESULTS, help="Target of TTFT, for goodput."
        ),
    ] = None,
    slo_tpot_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS", min=0, rich_help_panel=RESULTS, help="Target of TPOT, for goodput."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=RESULTS,
            help="Write result.json, requests.csv, latency.png and time-series.png here.",
        ),
    ] = None,
    format: Annotated[
        Output,
        typer.Option(
            "--format", "-o", rich_help_panel=RESULTS, help="text for people, json for programs."
        ),
    ] = Output.TEXT,
) -> None:
    """Send load to an OpenAI-compatible server and measure its answers.

    TTFT: from sending a request to its first chunk with a token. TPOT: (last token - first token)
    / (output tokens - 1). ITL: between two chunks with tokens. E2E: from sending to the last token.
    Goodput: complete requests per second within every SLO target. Rates count complete requests; TTFT and ITL
    also what was measured of those cut off.

    Ctrl-C ends the run, reports what was measured, and exits with 130; with 69 if no request was
    answered.
    """
    from sparsed.controller.bench.connection import parse_server
    from sparsed.controller.bench.planning import WorkloadOptions, plan_workload
    from sparsed.controller.bench.serve import BenchOptions
    from sparsed.controller.cli.bench_run import make_directory, run_bench_serve

    workload = WorkloadOptions(
        num_prompts=num_prompts,
        request_rate_per_s=request_rate,
        burstiness=burstiness,
        input_lengths=_lengths(input_len, field="input-len"),
        output_lengths=_lengths(output_len, field="output-len"),
        shared_prefix_tokens=shared_prefix_len,
        trace=trace,
        time_scale=time_scale,
        max_input_tokens=max_input_len,
        max_output_tokens=max_output_len,
        seed=seed,
    )
    options = BenchOptions(
        server=parse_server(url, api_key=api_key),
        endpoint=endpoint,
        model=model,
        plan=plan_workload(workload),
        slo=Slo(ttft_s=_seconds(slo_ttft_ms), tpot_s=_seconds(slo_tpot_ms)),
        vocab_size=vocab_size,
        ignore_eos=ignore_eos,
        sparse=_sparse(sparse_mode, token_budget),
        num_warmup=warmup,
        timeout_s=timeout_s,
        max_concurrency=max_concurrency,
        command=_command(sys.argv[1:]),
    )
    make_directory(output_dir)
    raise typer.Exit(run_bench_serve(options, directory=output_dir, output=format))


def _lengths(text: str | None, *, field: str) -> Lengths | None:
    from sparsed.controller.bench.lengths import parse_lengths

    return None if text is None else parse_lengths(text, field=field)


def _seconds(value_ms: float | None) -> float | None:
    return None if value_ms is None else value_ms / 1e3


def _sparse(mode: SparseMode | None, token_budget: int | None) -> dict[str, object] | None:
    """The field of the body; None sends none, so that other servers have nothing to refuse."""
    if mode is SparseMode.OFF and token_budget is not None:
        raise InputError("--token-budget has no effect with --sparse-mode off", field="sparse-mode")
    values = {"mode": None if mode is None else mode.value, "token_budget": token_budget}
    return {name: value for name, value in values.items() if value is not None} or None


def _command(arguments: Sequence[str]) -> str:
    """What was typed, without the API key and without a password in the URL."""
    shown, before = ["sparsed"], ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in SECRETS:
            shown.append(f"{name}={_hidden(name, value)}")
        else:
            shown.append(_hidden(before, argument) if before in SECRETS else argument)
        before = argument
    return shlex.join(shown)


def _hidden(name: str, value: str) -> str:
    from sparsed.controller.bench.connection import hide_credentials

    return hide_credentials(value) if name == "--url" else "***"
