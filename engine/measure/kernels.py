"""Kernels at the sizes of a model, against what the device can do at most.

METHOD: random data; the median of repeats after runs that compile and warm up, between CUDA
events whose work the host has queued before. Inputs are rotated, in all larger than the L2 cache,
and what runs shortly runs as one captured graph. Rates are of bytes that must be moved (or FLOP),
ratios to the ceiling of the same run: a plain copy in device memory, one large DMA each way, a
product of large matrices. On a CPU the same operations in plain torch, where they are used.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Final

import torch

from sparsed.core import (
    Ceiling,
    CopyPath,
    Direction,
    KernelReport,
    KernelSpeed,
    MeasureKernels,
)
from sparsed.engine.assembly import Progress, device_name, library_versions
from sparsed.engine.calibrate import open_meter
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.link_plan import KIB, QUICK_TILE_BYTES, LinkPoint
from sparsed.engine.measure.attention_cases import attention_cases
from sparsed.engine.measure.cases import Case, Setting, token_cases
from sparsed.engine.measure.ceilings import (
    copy_bytes_per_s,
    give_back_memory,
    matmul_flop_per_s,
)
from sparsed.engine.measure.clock import Clock
from sparsed.engine.measure.sparse_cases import sparse_cases

COPY_PROGRAMS: Final = (8, 16, 32)


def measure_kernels(wanted: MeasureKernels, *, on_progress: Progress) -> KernelReport:
    """Measure the ceilings, then everything against them.

    Errors: StartError where memory cannot be pinned.
    """
    setting = Setting(
        device=torch.device(wanted.device),
        dtype=getattr(torch, wanted.dtype),
        shape=wanted.shape,
        page_size=wanted.page_size,
        batches=wanted.batches,
        contexts=wanted.contexts,
    )
    on_progress("measuring the ceilings", 0.0)
    ceilings, speeds = measure_copies(setting)
    clock = Clock(setting.device)
    ceilings[Ceiling.COPY] = copy_bytes_per_s(clock)
    ceilings[Ceiling.MATMUL] = matmul_flop_per_s(clock, dtype=setting.dtype)
    skipped = []
    cases = [*attention_cases(setting), *sparse_cases(setting), *token_cases(setting)]
    for number, case in enumerate(cases, start=1):
        speed = measure_case(case, clock=clock, ceilings=ceilings)
        if speed is None:
            skipped.append(f"{case.kernel} {case.words}")
        else:
            speeds.append(speed)
        on_progress("measuring kernels", number / len(cases))
    return KernelReport(
        device_name=device_name(setting.device),
        dtype=wanted.dtype,
        versions=library_versions(),
        ceilings=ceilings,
        kernels=tuple(speeds),
        skipped=tuple(skipped),
    )


def measure_case(
    case: Case, *, clock: Clock, ceilings: Mapping[Ceiling, float]
) -> KernelSpeed | None:
    """None where the device has no memory or no implementation for the case."""
    try:
        seconds = _case_s(case, clock=clock)
    except torch.OutOfMemoryError:
        seconds = None
    gc.collect()
    give_back_memory(clock.device)
    if seconds is None:
        return None
    rate = case.amount / seconds
    return KernelSpeed(
        kernel=case.kernel,
        case=case.words,
        time_us=seconds * 1e6,
        rate=rate,
        ceiling=case.ceiling,
        ratio=rate / ceilings[case.ceiling],
    )


def _case_s(case: Case, *, clock: Clock) -> float | None:
    """Seconds of one work, if there is any; all inputs are gone afterwards."""
    works = case.make()
    if not works:
        return None
    before, works = (works[0], works[1:]) if case.prepared else (None, works)
    return clock.each_s(works, before=before, capture=case.capture)


def measure_copies(setting: Setting) -> tuple[dict[Ceiling, float], list[KernelSpeed]]:
    """Random pages between the tiers, and the DMAs they are compared with. On a CPU both lie in
    the same memory: one direction says it all."""
    page_bytes = setting.page_size * 2 * setting.shape.head_dim * setting.dtype.itemsize
    with open_meter(setting.device) as meter:
        whole = meter.contiguous()
        ceilings = {Ceiling.H2D: whole.h2d_bytes_per_s, Ceiling.D2H: whole.d2h_bytes_per_s}
        speeds = []
        for point in copy_points(setting.device, page_bytes=page_bytes):
            ceiling, choice = Ceiling(point.direction.value), point.choice
            rate = meter.measure(point).bytes_per_s
            words = f", {choice.programs} programs" if choice.programs else ""
            speeds.append(
                KernelSpeed(
                    kernel=f"copy_pages {point.direction}",
                    case=f"{page_bytes / KIB:g} KiB{words}",
                    time_us=None,
                    rate=rate,
                    ceiling=ceiling,
                    ratio=rate / ceilings[ceiling],
                )
            )
    return ceilings, speeds


def copy_points(device: torch.device, *, page_bytes: int) -> list[LinkPoint]:
    if device.type == "cpu":
        directions, choices = [Direction.H2D], [CopyChoice(CopyPath.MEMCPY, 0, 0)]
    else:
        directions = list(Direction)
        choices = [CopyChoice(CopyPath.KERNEL, n, QUICK_TILE_BYTES) for n in COPY_PROGRAMS]
    return [
        LinkPoint(direction=direction, piece_bytes=page_bytes, choice=choice, beside=False)
        for direction in directions
        for choice in choices
    ]
