"""``sparsed status``, ``drain`` and ``stop``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed.controller.cli.output import (
    Output,
    OutputOption,
    complain,
    gib,
    print_json,
    print_table,
)
from sparsed.controller.cli.session import DEGRADED, ERROR, StateDirOption, connect, find_state_dir
from sparsed.controller.state_dir import StateDir, StateLock
from sparsed.core import ExitCode, StartError

if TYPE_CHECKING:
    from sparsed.controller.control import DaemonStatus
    from sparsed.core import CopyTotal, EngineStats, HbmUse, LinkProbe, Slo, Snapshot

POLL_S = 0.2


def status(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show state, model, tiers, traffic and the last measured window.

    Exit status 0 when serving, 4 when degraded, restarting, loading or draining, 3 when no
    daemon runs.
    """
    with connect(state_dir) as client:
        now = client.status()
    if output is Output.JSON:
        print_json(now)
    else:
        print_table(("status", ""), _lines(now))
    if now.state != "serving":
        raise typer.Exit(DEGRADED)


def drain(
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Cut off what still runs after this time. Default: --shutdown-timeout of start.",
        ),
    ] = None,
    state_dir: StateDirOption = None,
) -> None:
    """Refuse new requests and wait for the running ones; the daemon stays up."""
    with connect(state_dir, write=True) as client:
        num_cut_off = client.drain(timeout_s=timeout)
    print(f"drained; {num_cut_off} requests were cut off")


def stop(
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="Wait this long for the end; 0 does not wait."),
    ] = 60.0,
    state_dir: StateDirOption = None,
) -> None:
    """Stop the daemon in order: running requests finish up to its shutdown timeout.

    Asked a second time, it stops at once.
    """
    with connect(state_dir, write=True) as client:
        pid = client.status().pid
        client.request_stop()
    print(f"stopping pid {pid}", flush=True)
    place, deadline = find_state_dir(state_dir), time.monotonic() + wait
    while wait and not _has_ended(place):
        if time.monotonic() > deadline:
            complain(f"pid {pid} is still stopping after {wait:g} s")
            raise typer.Exit(ERROR)
        time.sleep(POLL_S)


def _has_ended(place: StateDir) -> bool:
    """The lock of the state directory is free, so another daemon could start there."""
    try:
        StateLock(place, verb="stop").release()
    except StartError as error:
        # Who may not even try the lock sees at least the sockets go.
        return error.code is ExitCode.NO_PERMISSION and not place.admin_socket.exists()
    return True


def _lines(now: DaemonStatus) -> Iterator[tuple[str, object]]:
    yield "state", ", ".join((now.state.value, *now.reasons))
    yield "version", f"{now.version}, pid {now.pid}, up {now.uptime_s:.0f} s"
    yield "address", now.http_url
    yield "model", f"{now.model}, {now.dtype} on {now.device}"
    yield "profile", now.profile
    if now.facts and now.facts.selection_trace:
        yield "selections", f"replayed from {now.facts.selection_trace}"
    yield "tuner", now.tuner_mode.value
    yield "targets", targets_in_words(now.slo)
    if not now.knobs.is_profiled:
        yield "profiler", "off: what follows is as it was last reported"
    yield "engine restarts", now.engine_restarts
    yield "failed requests", now.requests_failed
    yield "lost writes", now.store_lost_writes
    for entry in now.facts.copies if now.facts else ():
        programs = f", {entry.programs} programs" if entry.programs else ""
        yield (
            f"{entry.direction} of {entry.piece_bytes / 1024:g} KiB",
            f"by {entry.path}{programs}, {entry.bytes_per_s / 1e9:.1f} GB/s when calibrated",
        )
    if now.stats:
        yield from _tier_lines(now.stats)
    if now.snapshot:
        if now.snapshot.hbm:
            yield from _hbm_lines(now.snapshot.hbm)
        yield from _traffic_lines(now.snapshot)
        if (slowdown := now.snapshot.host.gpu_slowdown) is not None:
            yield "GPU clocks", f"cut: {slowdown.value}"
        if now.facts:
            yield "link in use H2D / D2H", _link_shares(now.snapshot, now.facts.link)


def targets_in_words(slo: Slo) -> str:
    """As they were given to the start."""
    given = (
        ("TTFT", slo.ttft_s, 1e3, " ms"),
        ("TPOT", slo.tpot_s, 1e3, " ms"),
        ("attention recall", slo.min_recall, 1.0, ""),
    )
    shown = [
        f"{name} {factor * target:g}{unit}"
        for name, target, factor, unit in given
        if target is not None
    ]
    return ", ".join(shown) or "none"


def _tier_lines(stats: EngineStats) -> Iterator[tuple[str, object]]:
    if stats.applying:
        yield "applying", f"{', '.join(stats.applying.names)} {100 * stats.applying.frac:.0f} %"
    yield "requests", f"{stats.num_running} running, {stats.num_waiting} waiting"
    yield from _queue_lines(stats)
    yield "hot tier", f"{gib(stats.hot_used_bytes)} of {gib(stats.hot_total_bytes)}"
    yield "DRAM tier", f"{gib(stats.dram_used_bytes)} of {gib(stats.dram_total_bytes)}"
    yield "working set", f"{stats.working_set_pages} pages, {gib(stats.working_set_bytes)}"
    yield "summaries", gib(stats.metadata_bytes)
    if stats.foreseen_pages:
        yield "foreseen pages", f"{stats.foreseen_pages}, {stats.wasted_pages} of them for nothing"
    if stats.timed_steps:
        exposed_ms = 1e3 * stats.exposed_s / stats.timed_steps
        yield (
            "waits for pages",
            f"{exposed_ms:.2f} ms a step that fetches, of {stats.timed_steps} timed",
        )
    if stats.overflow_pages:
        yield "overflow pages", stats.overflow_pages
    for item in stats.copies:
        yield f"{item.direction} by {item.path}", _copied(item)
    if stats.verify_checked_pages:
        checked, broken = stats.verify_checked_pages, stats.verify_mismatches
        yield "verified pages", f"{checked}, {broken} of them broken"


def _queue_lines(stats: EngineStats) -> Iterator[tuple[str, object]]:
    """Why requests wait now, why they have waited and were refused, and what quality asked for."""
    if stats.waiting:
        now = Counter(one.reason for one in stats.waiting)
        longest_s = max(one.waited_s for one in stats.waiting)
        yield "waiting for", f"{_counts(now.items())}; at most {longest_s:.1f} s so far"
    if stats.waits:
        yield "waits", _counts((one.reason, one.count) for one in stats.waits)
    if stats.refusals:
        yield "refusals", _counts((one.reason, one.count) for one in stats.refusals)
    if stats.spills:
        yield "spilled", f"{stats.spills}, {stats.restores} of them came back"
    if stats.quality_raises or stats.quality_dense:
        raises, dense = stats.quality_raises, stats.quality_dense
        yield "low recall", f"{raises} budgets raised, {dense} requests made dense"


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts)


def _hbm_lines(use: HbmUse) -> Iterator[tuple[str, object]]:
    """Device memory by owner; a line is missing where the driver does not tell."""
    for owner, size_bytes in (
        ("weights", use.weights_bytes),
        ("hot pages", use.hot_pages_bytes),
        ("summaries", use.summaries_bytes),
        ("page tables", use.tables_bytes),
        ("staging", use.staging_bytes),
        ("prefill buffers", use.prefill_buffer_bytes),
        ("rest of the engine", use.rest_bytes),
        ("other processes", use.others_bytes),
        ("free", use.free_bytes),
        ("peak of the engine", use.peak_bytes),
    ):
        if size_bytes is not None:
            yield f"HBM, {owner}", gib(size_bytes)


def _link_shares(last: Snapshot, link: LinkProbe) -> str:
    """Of the rates measured at the engine's start, by its own copies."""
    rates = (last.h2d_bytes, link.h2d_bytes_per_s), (last.d2h_bytes, link.d2h_bytes_per_s)
    return " / ".join(
        f"{100 * moved / last.window_s / rate:.1f} %" if rate > 0 and last.window_s > 0 else "-"
        for moved, rate in rates
    )


def _traffic_lines(last: Snapshot) -> Iterator[tuple[str, object]]:
    yield "window", f"{last.window_s:.1f} s, {last.steps} steps"
    yield "prompt tokens/s", f"{last.prompt_tokens_per_s:.1f}"
    yield "output tokens/s", f"{last.generated_tokens_per_s:.1f}"
    yield "step p50/p95/p99", _quantiles(last.step_p50_s, last.step_p95_s, last.step_p99_s)
    yield "TTFT p50/p95", _quantiles(last.ttft_p50_s, last.ttft_p95_s)
    yield "TPOT p50/p95", _quantiles(last.tpot_p50_s, last.tpot_p95_s)
    yield "hot hits", "-" if last.hot_hit_frac is None else f"{100 * last.hot_hit_frac:.1f} %"
    missed = last.misses_per_step
    yield "misses a step", "-" if missed is None else f"{missed:.1f} pages"
    yield "link H2D / D2H", f"{_rate(last.h2d_gb_per_s)} / {_rate(last.d2h_gb_per_s)}"
    recall = last.attention_recall
    yield "attention recall", "-" if recall is None else f"{recall:.4f}"


def _copied(item: CopyTotal) -> str:
    timed = f" in {item.seconds:.1f} s" if item.seconds else ""
    return f"{gib(item.num_bytes)}{timed}"


def _quantiles(*seconds: float | None) -> str:
    return " / ".join("-" if value is None else f"{1e3 * value:.1f}" for value in seconds) + " ms"


def _rate(gb_per_s: float | None) -> str:
    return "-" if gb_per_s is None else f"{gb_per_s:.2f} GB/s"
