"""From options to a plan: reads the model's config, and this machine where no GPU is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from sparsed.controller.config import DaemonConfig
from sparsed.controller.links import link_key
from sparsed.controller.lookups import calibrations_of
from sparsed.controller.plan.forecast import Place, Traffic
from sparsed.controller.plan.gpus import gpu_of, named_gpu
from sparsed.controller.plan.report import Plan, make_plan
from sparsed.controller.plan.search import choose
from sparsed.controller.startup import choose_dtype, find_model
from sparsed.core import (
    GpuRates,
    InputError,
    KnobValue,
    LinkCalibration,
    MachineFacts,
    ModelShape,
)
from sparsed.engine.hit_curve import START_MISS_FRAC, Learned
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.link_policy import choose_load
from sparsed.engine.planner import PAGE_TOKENS
from sparsed.profiler.machine import read_machine

CONTEXT_TOKENS: Final = 32768
UNKNOWN_BYTES: Final = 1 << 60  # memory of a host that nobody has told of


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """``gpu`` None: that of this machine. ``context`` None: 32,768 tokens, or what the model can.
    ``miss_frac``: of a selection, with as many slots as it has pages."""

    gpu: str | None = None
    context: int | None = None
    output_tokens: int = 256
    rate_per_s: float | None = None
    miss_frac: float = START_MISS_FRAC


def plan(
    config: DaemonConfig, options: PlanOptions, *, on_progress: Callable[[str, float], None]
) -> Plan:
    """The plan of one model for one kind of request. Reads files, may fetch a model: blocks.

    Errors: InputError naming the option that is wrong or does not fit; StartError (69) when the
    weights alone do not fit.
    """
    _check(options)
    if config.device == "cpu":
        raise InputError("--device cpu: plans are for GPUs; name one with --gpu", field="device")
    resolved, model = find_model(config, progress=on_progress)
    gpu, machine = _find_gpu(config, options)
    dtype = choose_dtype(config.dtype, device="cuda:0", model=model)
    place = Place(
        shape=model.shape,
        dtype=dtype,
        gpu=_with_known_link(config, options, machine, gpu, shape=model.shape, dtype=dtype),
        machine=machine,
        learned=replace(Learned(), miss_frac=options.miss_frac),
    )
    traffic = Traffic(
        context=_context(options, model.shape),
        output_tokens=options.output_tokens,
        slo=config.slo,
        rate_per_s=options.rate_per_s,
    )
    _check_knobs(config.knobs, traffic)
    choice = choose(place, traffic, asked=config.knobs)
    unknown_dram = options.gpu is not None and "kv_dram_gib" not in config.knobs
    return make_plan(
        resolved.model_id,
        place,
        traffic,
        choice,
        reference=config.model,
        unknown_dram=unknown_dram,
    )


def _check(options: PlanOptions) -> None:
    rate = options.rate_per_s
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"--rate {rate:g}: give requests per second above 0", field="rate")
    if not 0 < options.miss_frac <= 1:
        raise InputError(
            f"--miss-frac {options.miss_frac:g}: give a share above 0, at most 1", field="miss-frac"
        )


def _check_knobs(knobs: Mapping[str, KnobValue], traffic: Traffic) -> None:
    """Of what else than flags may have set: what a plan cannot follow."""
    longest = knobs.get("max_model_len")
    if longest is not None and int(longest) < traffic.request_tokens:
        raise InputError(
            f"max_model_len={longest} is below the {traffic.request_tokens} tokens of a request; "
            "raise it or lower --context",
            field="max_model_len",
        )
    if knobs.get("hbm_budget") is not None:
        raise InputError(
            f"hbm_budget={knobs['hbm_budget']} is set; a plan is for hbm_budget auto: unset it",
            field="hbm_budget",
        )


def _context(options: PlanOptions, shape: ModelShape) -> int:
    most = shape.max_position - options.output_tokens
    if most < 1:
        raise InputError(
            f"--output-tokens {options.output_tokens}: the model has {shape.max_position} positions "
            "for prompt and output; lower it",
            field="output-tokens",
        )
    if options.context is not None and options.context > most:
        raise InputError(
            f"--context {options.context}: with {options.output_tokens} output tokens the model "
            f"has room for {most}; lower it",
            field="context",
        )
    return options.context or min(CONTEXT_TOKENS, most)


def _find_gpu(config: DaemonConfig, options: PlanOptions) -> tuple[GpuRates, MachineFacts]:
    if options.gpu is None:
        machine = read_machine(gpu_index=int(config.device.partition(":")[2] or 0))
        gpu = replace(gpu_of(machine), hbm_bytes=machine.hbm_total_bytes)
        return gpu, machine
    gpu = named_gpu(options.gpu)
    return gpu, MachineFacts(
        cpu_name="not known",
        num_cpus=1,
        dram_total_bytes=UNKNOWN_BYTES,
        dram_free_bytes=UNKNOWN_BYTES,
        gpu_name=gpu.name,
        num_gpus=1,
        hbm_total_bytes=gpu.hbm_bytes,
        hbm_free_bytes=gpu.hbm_bytes,
    )


def _with_known_link(
    config: DaemonConfig,
    options: PlanOptions,
    machine: MachineFacts,
    gpu: GpuRates,
    *,
    shape: ModelShape,
    dtype: str,
) -> GpuRates:
    """With the rate of this machine's link, if a daemon has measured it."""
    key = link_key(machine) if options.gpu is None else None
    calibration = calibrations_of(config.state_dir)(key) if key else None
    if calibration is None:
        return gpu
    page_size = int(config.knobs.get("page_size") or PAGE_TOKENS)
    return with_calibration(gpu, calibration, shape=shape, dtype=dtype, page_size=page_size)


def with_calibration(
    gpu: GpuRates,
    calibration: LinkCalibration,
    *,
    shape: ModelShape,
    dtype: str,
    page_size: int,
    programs: int | None = None,
) -> GpuRates:
    """``gpu`` with the link as it was measured for such pages, loaded by so many programs; unchanged
    where no kernel was."""
    size = Geometry.of(shape, dtype=dtype, page_size=page_size).page_bytes
    entry = choose_load(calibration, piece_bytes=size, programs=programs)
    return gpu if entry is None else replace(gpu, link_bytes_per_s=entry.bytes_per_s)
