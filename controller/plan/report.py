"""A plan as it is kept, and as it is told."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from math import floor

from sparsed.controller.plan.forecast import Forecast, Place, Traffic
from sparsed.controller.plan.search import Choice, Verdict
from sparsed.core import GIB, KNOBS_BY_NAME, Bound, GpuRates

HEADERS = (
    "attention",
    "at once",
    "step ms",
    "TPOT ms",
    "TTFT s",
    "output tokens/s",
    "floor ms",
    "misses",
    "binds",
)
# What a start sets to the figure planned with; the others keep their defaults.
START_KNOBS = ("kv_hbm_gib", "kv_dram_gib", "max_num_seqs", "max_num_active_seqs", "max_model_len")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """``command``: the start it recommends, None where nothing fits. ``notes``: what the reader
    must know to trust the figures."""

    model: str
    dtype: str
    gpu: GpuRates
    traffic: Traffic
    choice: Choice
    command: str | None
    notes: tuple[str, ...]


def make_plan(
    model: str,
    place: Place,
    traffic: Traffic,
    choice: Choice,
    *,
    reference: str,
    unknown_dram: bool,
) -> Plan:
    """``reference``: what `sparsed start` calls the model; ``unknown_dram``: of the machine only
    the GPU is known."""
    best = choice.best
    return Plan(
        model=model,
        dtype=place.dtype,
        gpu=place.gpu,
        traffic=traffic,
        choice=choice,
        command=None if best is None else start_line(reference, best, traffic, dtype=place.dtype),
        notes=tuple(_notes(place, best, unknown_dram=unknown_dram)),
    )


def start_line(model: str, best: Forecast, traffic: Traffic, *, dtype: str) -> str:
    """The command that starts what was planned."""
    words = ["sparsed", "start", "--model", model, "--dtype", dtype]
    knobs = best.knobs.as_dict()
    for spec in KNOBS_BY_NAME.values():
        value = knobs[spec.name]
        if value is not None and (spec.name in START_KNOBS or value != spec.default):
            text = f"{floor(value * 1e3) / 1e3:g}" if isinstance(value, float) else str(value)
            words += [f"--{spec.name.replace('_', '-')}", text]
    for name, target_s in (("ttft", traffic.slo.ttft_s), ("tpot", traffic.slo.tpot_s)):
        if target_s is not None:
            words += [f"--slo-{name}-ms", f"{target_s * 1e3:g}"]
    return shlex.join(words)


def table_rows(choice: Choice) -> Iterator[tuple[object, ...]]:
    for name, item in choice.by_method.items():
        yield (
            name,
            item.service.requests,
            f"{item.step_s * 1e3:.2f}",
            f"{item.service.tpot_s * 1e3:.1f}",
            f"{item.service.ttft_s:.2f}",
            f"{item.service.output_tokens_per_s:,.0f}",
            f"{item.step.floor_s * 1e3:.2f}",
            f"{item.miss_frac:.1%}",
            item.bound.value,
        )


def limit_rows(choice: Choice) -> Iterator[tuple[object, ...]]:
    """Requests that each gate lets in."""
    for name, item in choice.by_method.items():
        limits = item.limits
        yield name, limits.hbm, limits.dram, limits.link, limits.rows, item.limits.binding


def in_words(plan: Plan) -> Iterator[str]:
    """What the tables do not say."""
    choice, best = plan.choice, plan.choice.best
    yield f"{choice.verdict}: {choice.why}"
    if best is not None:
        yield "binds: " + binding(best)
        peak = best.hbm
        yield (
            f"HBM peak {peak.total_bytes / GIB:.1f} of {plan.gpu.hbm_bytes / GIB:.1f} GiB: weights "
            f"{peak.weights_bytes / GIB:.1f}, hot pages {peak.hot_pages_bytes / GIB:.1f}, summaries "
            f"{peak.summaries_bytes / GIB:.2f}, tables {peak.tables_bytes / GIB:.2f}, staging "
            f"{peak.staging_bytes / GIB:.2f}, prompt buffer {peak.prefill_buffer_bytes / GIB:.2f}, "
            f"workspace {peak.workspace_bytes / GIB:.1f}"
        )
        yield (
            f"DRAM tier {best.dram_bytes / GIB:.1f} GiB, pinned, of which "
            f"{best.knobs.max_num_active_seqs} requests need {best.needed_dram_bytes / GIB:.1f}"
        )
        yield (
            f"knobs: hbm_budget auto (about {best.resident_tokens:,} tokens a request), "
            f"max_num_active_seqs {best.knobs.max_num_active_seqs}, prefill_chunk "
            f"{best.knobs.prefill_chunk}"
        )
        yield f"prompt of {plan.traffic.context:,} tokens alone: {best.prompt_s:.2f} s"
    yield from (f"note: {note}" for note in plan.notes)
    if plan.command is not None:
        word = "start with" if choice.verdict is Verdict.OK else "closest"
        yield f"{word}: {plan.command}"


def binding(best: Forecast) -> str:
    """What takes the time, and what keeps more requests out."""
    step = best.step
    words = {
        Bound.HBM: f"HBM-bound: {best.hbm_bytes / 1e9:.1f} GB read a step, "
        f"{(step.weights_s + step.kv_s) * 1e3:.1f} of its {best.step_s * 1e3:.1f} ms",
        Bound.LINK: f"link-bound: {best.link_bytes / 1e9:.2f} GB of missed pages a step, "
        f"{step.link_s * 1e3:.1f} of its {best.step_s * 1e3:.1f} ms",
        Bound.COMPUTE: f"compute-bound: prompts take {best.service.prompt_frac:.0%} of the time"
        + (f", products {step.arithmetic_s * 1e3:.1f} ms a step" if step.arithmetic_s else ""),
        Bound.LATENCY: f"latency-bound: small kernels take {step.latency_s * 1e3:.1f} of "
        f"{best.step_s * 1e3:.1f} ms",
    }
    at_most = best.limits.at_once
    told = words[best.bound]
    if best.most.requests == at_most < best.limits.rows:
        told += f"; {Bound.CAPACITY}: {best.limits.binding} lets {at_most} in at once"
    return told


def _notes(place: Place, best: Forecast | None, *, unknown_dram: bool) -> Iterator[str]:
    if not place.gpu.is_measured:
        yield (
            f"rates of {place.gpu.name} are data sheet figures times the share the H100 reached; "
            "the engine's own costs are those of the H100"
        )
    else:
        yield (
            "rates measured on one H100; the model is within 5 % of the 8B steps it was fitted to, "
            "given their misses, and far less exact without (docs/performance.md)"
        )
    if unknown_dram:
        yield (
            "the host's memory is not known: the DRAM tier is as large as max_num_seqs requests "
            "need; give --kv-dram-gib to plan with less"
        )
    if best is not None and best.selects and best.miss_frac:
        yield (
            f"misses of {best.miss_frac:.1%} are what an engine expects before any request ran; "
            "that was 1.6 to 3.7 times too many on the H100 (docs/performance.md); give --miss-frac to plan with yours"
        )
