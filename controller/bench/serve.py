"""``sparsed bench serve`` from its options to its report."""

from __future__ import annotations

import asyncio
import math
import platform
import re
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from typing import Final

import msgspec

from sparsed import __version__
from sparsed.controller.bench.client import LoadOptions, LoadResult, PreparedRequest, run_load
from sparsed.controller.bench.connection import Server
from sparsed.controller.bench.endpoint import Endpoint
from sparsed.controller.bench.planning import WorkloadPlan
from sparsed.controller.bench.preflight import ServedModel, check_lengths, find_model, reach
from sparsed.controller.bench.prompts import PromptMaker, TokenIds, to_text
from sparsed.controller.bench.records import RequestRecord
from sparsed.controller.bench.report import BenchReport
from sparsed.controller.bench.summary import summarize
from sparsed.controller.bench.time_series import time_series
from sparsed.core import ExitCode, Slo, StartError, WorkloadRequest

Progress = Callable[[str, float], None]
PACKAGES: Final = ("msgspec", "numpy")
SPARE_FILES: Final = 256
ABOUT_TOKEN_IDS: Final = re.compile(r"\btoken[ _-]?ids?\b|vocab", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """One run. ``sparse`` is sent as it is in every body, None: not at all. ``command`` is what was
    typed, for the report."""

    server: Server
    endpoint: Endpoint
    model: str | None
    plan: WorkloadPlan
    slo: Slo
    vocab_size: int
    ignore_eos: bool
    sparse: Mapping[str, object] | None
    num_warmup: int
    timeout_s: float
    max_concurrency: int | None
    command: str


async def bench_serve(options: BenchOptions, *, progress: Progress) -> BenchReport:
    """Check the server, warm it up, send the load.

    Cancelling it while load runs ends the run and reports it; before, it raises. Errors: as
    ``find_model`` and ``check_lengths``; StartError (69) if no warm-up request is answered.
    """
    options = replace(options, server=await reach(options.server))
    model = await find_model(options.server, wanted=options.model)
    requests = options.plan.workload.requests
    if options.endpoint is Endpoint.COMPLETIONS:  # of text, nobody knows the exact length
        check_lengths(requests, model=model, url=options.server.url)
    _allow_open_files(min(len(requests), options.max_concurrency or len(requests)))
    prepare = _Preparation(options, model=model)
    prepared = [prepare.request(number, item) for number, item in enumerate(requests)]
    await _warm_up(options, prepare=prepare)
    started_at = datetime.fromtimestamp(time.time(), tz=UTC)
    result = await run_load(
        prepared,
        options=_load_options(options),
        on_done=_follow(progress, total=len(prepared)),
    )
    return _report(options, model=model, result=result, started_at=started_at)


class _Preparation:
    """Makes bodies, so that a run has nothing to do but to send them."""

    def __init__(self, options: BenchOptions, *, model: ServedModel) -> None:
        self._options = options
        self._fixed = {
            "model": model.name,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if options.ignore_eos else {}),
            **({"sparse": dict(options.sparse)} if options.sparse else {}),
        }
        self._prompts = PromptMaker(
            ids=TokenIds.below(options.vocab_size),
            seed=options.plan.options.seed,
            shared_prefix_tokens=options.plan.options.shared_prefix_tokens,
        )

    def request(self, number: int, item: WorkloadRequest) -> PreparedRequest:
        return self._prepared(number, item, tokens=self._prompts.tokens(f"{number}", item))

    def warm_up(self, number: int, item: WorkloadRequest) -> PreparedRequest:
        """Of the same size, at once, and with nothing that a prefix cache could use later. Each has
        the largest id that a run may send: a model that does not know it refuses every one."""
        alone = PromptMaker(
            ids=TokenIds.below(self._options.vocab_size), seed=self._options.plan.options.seed
        )
        tokens = alone.tokens(f"warm-up {number}", replace(item, block_ids=()))
        tokens[-1] = self._options.vocab_size - 1
        return self._prepared(number, replace(item, arrival_s=0.0), tokens=tokens)

    def _prepared(
        self, number: int, item: WorkloadRequest, *, tokens: list[int]
    ) -> PreparedRequest:
        if self._options.endpoint is Endpoint.CHAT:
            messages = [{"role": "user", "content": to_text(tokens)}]
            prompt: dict[str, object] = {"messages": messages}
        else:
            prompt = {"prompt": tokens}
        body = {**self._fixed, **prompt, "max_tokens": item.output_tokens}
        record = RequestRecord(
            number=number,
            arrival_s=item.arrival_s,
            input_tokens=item.input_tokens,
            max_tokens=item.output_tokens,
        )
        return PreparedRequest(record=record, body=msgspec.json.encode(body))


async def _warm_up(options: BenchOptions, *, prepare: _Preparation) -> None:
    requests = options.plan.workload.requests
    warm = [prepare.warm_up(n, requests[n % len(requests)]) for n in range(options.num_warmup)]
    result = await run_load(warm, options=_load_options(options))
    if result.is_interrupted:
        raise asyncio.CancelledError
    failed = [record for record in result.records if not record.is_complete]
    if failed and len(failed) == len(warm):
        detail = failed[0].detail
        hint = "; a smaller --vocab-size may help" if ABOUT_TOKEN_IDS.search(detail) else ""
        raise StartError(
            f"{options.server.url} answers no request of the warm-up: {failed[0].error}, "
            f"{detail or 'no message'}{hint}",
            code=ExitCode.UNAVAILABLE,
        )


def _load_options(options: BenchOptions) -> LoadOptions:
    return LoadOptions(
        server=options.server,
        path=options.endpoint.path,
        timeout_s=options.timeout_s,
        max_concurrency=options.max_concurrency,
    )


def _follow(progress: Progress, *, total: int) -> Callable[[RequestRecord], None]:
    numbers = count(1)
    return lambda record: progress(f"{total} requests", next(numbers) / total)


def _report(
    options: BenchOptions, *, model: ServedModel, result: LoadResult, started_at: datetime
) -> BenchReport:
    return BenchReport(
        about=_about(options, model=model) | {"started_at": started_at.isoformat("T", "seconds")},
        slo=options.slo,
        result=result,
        summary=summarize(result, slo=options.slo),
        seconds=time_series(result.records),
    )


def _about(options: BenchOptions, *, model: ServedModel) -> dict[str, object]:
    """What was measured, with what, and how to do it again, as JSON data."""
    return {
        "command": options.command,
        "versions": {
            "sparsed": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "url": options.server.url,
        "server_version": model.server_version,
        "endpoint": options.endpoint.path,
        "model": model.name,
        "max_model_len": model.max_model_len,
        "sparse": options.sparse,
        "max_concurrency": options.max_concurrency,
        "vocab_size": options.vocab_size,
        "ignore_eos": options.ignore_eos,
        "num_warmup": options.num_warmup,
        "timeout_s": options.timeout_s,
        "workload": _workload(options.plan),
    }


def _workload(plan: WorkloadPlan) -> dict[str, object]:
    """Options that were not given are None; an infinite rate is a word, for JSON has no number."""
    values = asdict(plan.options)
    if values["request_rate_per_s"] == math.inf:
        values["request_rate_per_s"] = "inf"
    return values | {
        "trace": plan.options.trace.name if plan.options.trace else None,
        "num_requests": len(plan.workload.requests),
        "num_clipped": plan.num_clipped,
        "num_unused": plan.num_unused,
    }


def _allow_open_files(num_connections: int) -> None:
    """Every request under way is an open file, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
