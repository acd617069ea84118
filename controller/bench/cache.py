"""Caches of recorded selections: what is asked for, and what misses cost on a link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sparsed.controller.bench.measure import KERNELS_MODEL
from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource
from sparsed.controller.startup import choose_dtype, find_model
from sparsed.core import CachePolicy, CacheReport, CacheRow, CacheStudy, InputError, QuotaRule
from sparsed.engine.evaluate.recording import Recording, read_recording
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.sim.study import simulate

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """``page_size`` and ``token_budget`` None: those of the recordings."""

    files: tuple[Path, ...]
    policies: tuple[CachePolicy, ...]
    residencies: tuple[float, ...]
    quotas: QuotaRule
    page_size: int | None
    token_budget: int | None
    prefetch_pages: int
    link_gb_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkShape:
    """Whose pages cross which link: shares of the recordings are taken to be those of a model."""

    model: str
    dtype: str
    num_lanes: int
    page_bytes: int
    gb_per_s: float

    def time_ms(self, pages_per_lane: float) -> float:
        """That many pages of every lane, one after the other and at the full rate."""
        return self.size_bytes(pages_per_lane) / self.gb_per_s / 1e6

    def size_bytes(self, pages_per_lane: float) -> float:
        return pages_per_lane * self.num_lanes * self.page_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkCost:
    """Of one token of one request, but for the bytes of the hot tier."""

    hot_bytes: float  # of one request
    miss_bytes: float
    miss_ms: float
    worst_miss_ms: float  # in 1 % of the steps more
    prefetch_ms: float
    wasted_bytes: float  # prefetched and never used


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBench:
    """The recordings that were read, what caches would do with them, and the link."""

    files: tuple[Path, ...]
    recordings: tuple[Recording, ...]
    report: CacheReport
    link: LinkShape

    def cost(self, row: CacheRow) -> LinkCost:
        link, selected = self.link, self.report.mean_selected_pages
        prefetched = row.prefetched_frac * selected
        return LinkCost(
            hot_bytes=link.size_bytes(row.slots / self.report.num_lanes),
            miss_bytes=link.size_bytes(row.miss_frac * selected),
            miss_ms=link.time_ms(row.miss_frac * selected),
            worst_miss_ms=link.time_ms(row.worst_miss_frac * selected),
            prefetch_ms=link.time_ms(prefetched),
            wasted_bytes=link.size_bytes(prefetched * (1 - (row.used_frac or 0.0))),
        )


def bench_cache(
    config: DaemonConfig, options: CacheOptions, *, on_progress: Progress
) -> CacheBench:
    """Read the recordings and simulate. Seconds of numpy on a CPU; no daemon, no device.

    Errors: InputError for a file (DATA where its content is wrong), an option or the model.
    """
    recordings = tuple(read_recording(file) for file in options.files)
    study = _study(options, recordings)
    link = _link(config, page_size=study.page_size, gb_per_s=options.link_gb_per_s)
    return CacheBench(
        files=options.files,
        recordings=recordings,
        report=simulate(recordings, study, on_progress=on_progress),
        link=link,
    )


def _study(options: CacheOptions, recordings: tuple[Recording, ...]) -> CacheStudy:
    headers = [recording.header for recording in recordings]
    return CacheStudy(
        page_size=options.page_size
        or _common({header.page_size for header in headers}, field="page_size"),
        token_budget=options.token_budget
        or _common({header.token_budget for header in headers}, field="token_budget"),
        policies=options.policies,
        residencies=options.residencies,
        quotas=options.quotas,
        prefetch_pages=options.prefetch_pages,
    )


def _common(values: set[int], *, field: str) -> int:
    if len(values) > 1:
        words = ", ".join(map(str, sorted(values)))
        option = f"--{field.replace('_', '-')}"
        raise InputError(f"recordings of different {field}: {words}; give {option}", field=field)
    return values.pop()


def _link(config: DaemonConfig, *, page_size: int, gb_per_s: float) -> LinkShape:
    """Of a GPU: the dtype is the one that the model would run in there."""
    if config.origin("model") is KnobSource.DEFAULT:
        config = replace(config, model=KERNELS_MODEL)
    _, model = find_model(config, progress=lambda phase, frac: None)
    dtype = choose_dtype(config.dtype, device="cuda", model=model)
    geometry = Geometry.of(model.shape, dtype=dtype, page_size=page_size)
    return LinkShape(
        model=config.model,
        dtype=dtype,
        num_lanes=geometry.num_lanes,
        page_bytes=geometry.page_bytes,
        gb_per_s=gb_per_s,
    )
