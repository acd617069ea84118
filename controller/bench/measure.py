"""Measurements of the engine itself, without a server: what to measure, and the process for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Final, TypeVar

import msgspec

from sparsed import __version__
from sparsed.controller.bench.process import Progress, run_measurement
from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource
from sparsed.controller.startup import StartPlan, choose_dtype, find_device, find_model, prepare
from sparsed.controller.state_dir import StateLock
from sparsed.core import (
    GIB,
    KNOBS_BY_NAME,
    DecodePoint,
    DecodeReport,
    EngineSpec,
    InputError,
    KernelReport,
    KnobValue,
    MeasureDecode,
    MeasureKernels,
    SparseMethod,
)
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.measure.points import SPARE_TOKENS, fits, total_tokens
from sparsed.engine.planner import PAGE_TOKENS, plan_memory

Report = TypeVar("Report", DecodeReport, KernelReport)

COMMAND: Final = (sys.executable, "-P", "-m", "sparsed.engine.measure")
BATCHES: Final = {"cpu": (1, 4), "cuda": (1, 8, 32, 64)}
CONTEXTS: Final = {"cpu": (512, 2048), "cuda": (2048, 8192, 32768)}
KERNELS_MODEL: Final = "dummy:llama-3.1-8b"
KERNEL_BATCHES: Final = {"cpu": (1, 4), "cuda": (1, 8, 24, 32, 64)}


def bench_decode(
    config: DaemonConfig,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    on_progress: Progress,
) -> DecodeReport:
    """Decode steps at every batch of every context; none given: the usual ones of the device.

    Errors: InputError for model, device, contexts or knobs; StartError, TEMPORARY beside a daemon
    of the same state directory, else as the measuring process says.
    """
    with StateLock(config.state_dir, verb="bench decode"):
        wanted = plan_decode(config, batches=batches, contexts=contexts, on_progress=on_progress)
        return _run(wanted, answer=DecodeReport, on_progress=on_progress)


def bench_kernels(
    config: DaemonConfig,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    on_progress: Progress,
) -> KernelReport:
    """Kernels at the sizes of the model. Errors as ``bench_decode``."""
    with StateLock(config.state_dir, verb="bench kernels"):
        wanted = plan_kernels(config, batches=batches, contexts=contexts, on_progress=on_progress)
        return _run(wanted, answer=KernelReport, on_progress=on_progress)


def plan_decode(
    config: DaemonConfig,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    on_progress: Progress,
) -> MeasureDecode:
    """An engine with room for the points, dense unless the operator says otherwise; the DRAM tier
    is no larger than the largest point that fits the hot one."""
    kind = find_device(config.device)[0].partition(":")[0]
    _, model = find_model(config, progress=on_progress)
    knobs = {"sparse_method": SparseMethod.DENSE.value, **_explicit_knobs(config)}
    chunk_tokens = int(knobs.get("prefill_chunk") or KNOBS_BY_NAME["prefill_chunk"].default or 0)
    points = choose_points(
        batches or BATCHES[kind],
        contexts,
        usual_contexts=CONTEXTS[kind],
        max_tokens=model.max_position,
    )
    longest = max(total_tokens(point, chunk_tokens=chunk_tokens) for point in points)
    knobs["max_num_seqs"] = max(point.requests for point in points)
    knobs["max_model_len"] = max(128, min(longest, model.max_position))
    plan = prepare(replace(config, knobs=knobs, no_profile=True), progress=on_progress)
    spec = plan.spec if "kv_dram_gib" in knobs else _with_small_pool(plan, points)
    return MeasureDecode(spec=spec, points=points)


def plan_kernels(
    config: DaemonConfig,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    on_progress: Progress,
) -> MeasureKernels:
    if config.origin("model") is KnobSource.DEFAULT:
        config = replace(config, model=KERNELS_MODEL)
    device, _ = find_device(config.device)
    kind = device.partition(":")[0]
    _, model = find_model(config, progress=on_progress)
    return MeasureKernels(
        device=device,
        dtype=choose_dtype(config.dtype, device=device, model=model),
        shape=model.shape,
        page_size=int(_explicit_knobs(config).get("page_size") or PAGE_TOKENS),
        batches=tuple(batches or KERNEL_BATCHES[kind]),
        contexts=tuple(contexts or CONTEXTS[kind]),
    )


def choose_points(
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    usual_contexts: Sequence[int],
    max_tokens: int,
) -> tuple[DecodePoint, ...]:
    """Every batch of every context. InputError for one that is beyond the model's positions; of
    the usual contexts, taken where none are given, those that are not."""
    most = max_tokens - SPARE_TOKENS
    for context in contexts:
        if context > most:
            raise InputError(
                f"--contexts {context}: the model has {max_tokens} positions, and the output "
                f"needs some; give at most {most}",
                field="contexts",
            )
    contexts = contexts or [c for c in usual_contexts if c <= most] or [max(1, most)]
    return tuple(
        DecodePoint(requests=batch, tokens=context) for context, batch in product(contexts, batches)
    )


def _with_small_pool(plan: StartPlan, points: Sequence[DecodePoint]) -> EngineSpec:
    """Pinning memory takes long: no more of it than the points need that can be measured."""
    spec, shape = plan.spec, plan.model.shape
    knobs = spec.knobs
    num_lanes, chunk_tokens = shape.num_lanes, knobs.prefill_chunk
    frames = [
        point.requests * num_frames(total_tokens(point, chunk_tokens=chunk_tokens))
        for point in points
        if fits(point, knobs=knobs, plan=spec.plan, num_lanes=num_lanes)
    ]
    geometry = Geometry.of(shape, dtype=spec.dtype, page_size=knobs.page_size)
    gib = (max(frames, default=1) + 0.5) * geometry.frame_bytes / GIB  # half: rounded down later
    least = KNOBS_BY_NAME["kv_dram_gib"].minimum or 0.0
    knobs = replace(knobs, kv_dram_gib=min(knobs.kv_dram_gib, max(gib, least)))
    return replace(spec, knobs=knobs, plan=plan_memory(knobs, shape=shape, dtype=spec.dtype))


def _explicit_knobs(config: DaemonConfig) -> dict[str, KnobValue]:
    """Those of flags and environment; what a daemon keeps for its next start is not meant here."""
    knobs: Mapping[str, KnobValue] = config.knobs
    return {
        name: value for name, value in knobs.items() if config.origin(name) is not KnobSource.LIVE
    }


def _run(
    wanted: MeasureDecode | MeasureKernels, *, answer: type[Report], on_progress: Progress
) -> Report:
    request = msgspec.json.encode({type(wanted).__name__: wanted})
    report = run_measurement(COMMAND, request, answer=answer, on_progress=on_progress)
    return replace(report, versions={"sparsed": __version__, **report.versions})
