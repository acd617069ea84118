"""``sparsed bench cache``: what hot tiers of several sizes would miss of recorded selections."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sparsed.controller.cli.bench_engine import choose_flags
from sparsed.controller.cli.flags import takes
from sparsed.controller.cli.output import FormatOption, Output, print_json, print_table
from sparsed.controller.cli.progress import ProgressLine
from sparsed.controller.config import load_config
from sparsed.controller.writable import check_directory
from sparsed.core import RESIDENCIES, CachePolicy, InputError, QuotaRule

if TYPE_CHECKING:
    from sparsed.controller.bench.cache import CacheBench

POLICIES: Final = ",".join(CachePolicy)
SIZES: Final = ",".join(f"{residency:g}" for residency in RESIDENCIES)

RecordingsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="RECORDING",
        help="Files of benchmarks/record_selection.py, of one model; their steps are pooled.",
        show_default=False,
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME",
        help="lru (exact), bucketed (by age in steps, as the device does it), belady (the bound).",
    ),
]
ResidencyOption = Annotated[
    str, typer.Option(metavar="N,N", help="Slots over selected full pages, 1 or more.")
]
BudgetOption = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=1,
        help="Tokens that a step reads of each lane, the partial page included. Default: as "
        "recorded.",
    ),
]
PageSizeOption = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", min=1, help="A multiple of the recorded one, the default."),
]
QuotasOption = Annotated[
    QuotaRule,
    typer.Option(
        help="uneven: slots by what they saved each lane in the first half of the steps, beside "
        "equal ones, and both are judged on the second."
    ),
]
PrefetchOption = Annotated[
    int,
    typer.Option(
        metavar="PAGES", min=0, help="Load so many next-ranked pages of each lane after a step."
    ),
]
LinkOption = Annotated[
    float,
    typer.Option(
        "--link-gb-per-s", metavar="GB/S", help="Rate of pages to the GPU: see bench link."
    ),
]
DirectoryOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write result.json and misses.png here.")
]


@takes(*choose_flags("model", "state_dir", "dtype", model="dummy:llama-3.1-8b"))
def cache(
    recordings: RecordingsArgument,
    policy: PolicyOption = POLICIES,
    residency: ResidencyOption = SIZES,
    token_budget: BudgetOption = None,
    page_size: PageSizeOption = None,
    quotas: QuotasOption = QuotaRule.EQUAL,
    prefetch: PrefetchOption = 0,
    link_gb_per_s: LinkOption = 50.0,
    output_dir: DirectoryOption = None,
    format: FormatOption = Output.TEXT,
    **flags: str | bool | None,
) -> None:
    """Simulate hot tiers on recorded selections of pages: what they miss, and the time it takes.

    Misses are shares of the selected pages; their milliseconds are those of one token of one
    request of --model, were its selections like the recorded ones. Needs neither a GPU nor a
    daemon.
    """
    from sparsed.controller.bench.cache import CacheOptions, bench_cache

    options = CacheOptions(
        files=tuple(recordings),
        policies=parse_policies(policy),
        residencies=parse_residencies(residency),
        quotas=quotas,
        page_size=page_size,
        token_budget=token_budget,
        prefetch_pages=prefetch,
        link_gb_per_s=_checked_rate(link_gb_per_s),
    )
    check_directory(output_dir, option="output-dir")
    bench = bench_cache(
        load_config(flags=flags, environment=os.environ),
        options,
        on_progress=ProgressLine(only_terminal=format is Output.JSON),
    )
    _finish(bench, directory=output_dir, format=format)


def parse_policies(text: str) -> tuple[CachePolicy, ...]:
    """Names with commas between them, each once; InputError naming the option."""
    try:
        policies = [CachePolicy(part) for part in _parts(text)]
    except ValueError:
        policies = []
    if not policies:
        raise InputError(
            f"--policy {text!r}: allowed are {', '.join(CachePolicy)}, with commas between them",
            field="policy",
        )
    return tuple(dict.fromkeys(policies))


def parse_residencies(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, ascending, each once; InputError naming the option."""
    try:
        residencies = {float(part) for part in _parts(text)}
    except ValueError:
        residencies = set()
    if not residencies or not all(1 <= residency < float("inf") for residency in residencies):
        raise InputError(
            f"--residency {text!r}: allowed are numbers from 1 up, with commas between them: a "
            "lane holds at least what it selects",
            field="residency",
        )
    return tuple(sorted(residencies))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _checked_rate(gb_per_s: float) -> float:
    if not 0 < gb_per_s < float("inf"):
        raise InputError(
            f"--link-gb-per-s {gb_per_s:g}: give a rate of more than 0", field="link_gb_per_s"
        )
    return gb_per_s


def _finish(bench: CacheBench, *, directory: Path | None, format: Output) -> None:
    """Print, and write what was asked for."""
    from sparsed.controller.bench import cache_report

    arguments = sys.argv[1:]
    if format is Output.JSON:
        print_json(cache_report.to_plain(bench, arguments=arguments))
    else:
        print_table(cache_report.headers(bench), cache_report.table_rows(bench))
        print(*cache_report.remarks(bench), sep="\n")
    if directory is None:
        return
    try:
        paths = cache_report.write_files(bench, directory, arguments=arguments)
    except OSError as error:
        raise InputError(f"--output-dir {directory}: {error}", field="output-dir") from None
    if format is Output.TEXT:
        print(*(f"wrote {path}" for path in paths), sep="\n")
