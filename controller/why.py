"""What binds the daemon now, what would help, and what was tried: the parts brought together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Final

from sparsed.controller.control import Explanation, LoadState, TriedChange
from sparsed.controller.plan.gpus import gpu_of
from sparsed.controller.startup import StartPlan
from sparsed.core import (
    DTYPE_BYTES,
    AcceptanceDecision,
    Bound,
    Ceilings,
    Direction,
    EngineFacts,
    GpuRates,
    InputError,
    Knobs,
    KnobValue,
    MachineFacts,
    Platform,
    ProfileKey,
    RolloutState,
    Snapshot,
    Verdict,
)
from sparsed.db.store import Store
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.measure.points import weights_read_bytes
from sparsed.profiler.verdict import fresh, judge
from sparsed.tuner.explain import explain as in_words
from sparsed.tuner.remedies import remedies
from sparsed.tuner.roofline import ENGINE_COSTS, StepLoad, prompt_flop, step_time

NUM_SHOWN: Final = 5  # of what was advised, of what was tried, and of what was rolled out
OFF: Final = "the profiler is off; to turn it on: sparsed knobs set profiler=on"
ENDS: Final = (RolloutState.SUCCESS, RolloutState.REVERTED, RolloutState.EXPIRED)


async def explain(
    store: Store,
    plan: StartPlan,
    windows: Sequence[Snapshot],
    *,
    knobs: Knobs,
    facts: EngineFacts | None,
    load: LoadState,
) -> Explanation:
    """``windows``: the last ones, the oldest first; ``knobs``: those in force. Errors: StoreError
    when what was tried cannot be read."""
    verdict = verdict_of(plan, windows, facts=facts)
    if not knobs.is_profiled:
        verdict = Verdict(bound=Bound.UNKNOWN, reason=OFF)
    found = await asyncio.to_thread(_with_history, store, plan.key, verdict, knobs=knobs)
    return replace(found, load=load)


def verdict_of(
    plan: StartPlan, windows: Sequence[Snapshot], *, facts: EngineFacts | None
) -> Verdict:
    """What binds now; ``windows`` as in ``explain``."""
    now = time.time()
    return judge(windows, ceilings(plan, fresh(windows, now=now), facts=facts), now=now)


def ceilings(
    plan: StartPlan, windows: Sequence[Snapshot], *, facts: EngineFacts | None
) -> Ceilings:
    """What the machine carries, and the floor of a mean step of ``windows`` on a GPU whose rates
    are known."""
    is_gpu = plan.spec.device != "cpu"
    gpu = _rates(plan.machine) if is_gpu else None
    floors = _floors(plan, windows, gpu) if gpu and any(one.steps for one in windows) else {}
    return Ceilings(
        num_cpus=plan.machine.num_cpus,
        is_gpu=is_gpu,
        h2d_bytes_per_s=_load_rate(plan, facts) if facts else None,
        **floors,
    )


def platform_of(plan: StartPlan, facts: EngineFacts) -> Platform:
    """What was measured of the link; nothing is known of it on a CPU."""
    if plan.spec.device == "cpu":
        return Platform()
    return Platform(
        pcie_generation=plan.machine.pcie_generation,
        pcie_width=plan.machine.pcie_width,
        h2d_bytes_per_s=_load_rate(plan, facts),
    )


def _rates(machine: MachineFacts) -> GpuRates | None:
    try:
        return gpu_of(machine)
    except InputError:  # a GPU that the table does not have
        return None


def _load_rate(plan: StartPlan, facts: EngineFacts) -> float:
    """Of pages as they are loaded; of a plain copy where that was not measured."""
    size = _geometry(plan).page_bytes
    rates = [
        entry.bytes_per_s
        for entry in facts.copies
        if entry.direction is Direction.H2D and entry.piece_bytes == size
    ]
    return rates[0] if rates else facts.link.h2d_bytes_per_s


def _floors(plan: StartPlan, windows: Sequence[Snapshot], gpu: GpuRates) -> dict[str, float]:
    """Seconds of a mean step. Attention within prompts is left out, so a prompt's part is low."""
    spec, shape = plan.spec, plan.model.shape
    num_steps = sum(one.steps for one in windows)
    selected = sum((one.selected_pages_per_step or 0.0) * one.steps for one in windows) / num_steps
    in_place = windows[-1].hot_used_frac * spec.plan.hot_pages_bytes
    load = StepLoad(
        requests=round(fmean(one.num_running for one in windows)),
        weights_bytes=weights_read_bytes(shape, dtype=spec.dtype),
        element_bytes=DTYPE_BYTES[spec.dtype],
        kv_bytes=selected * _geometry(plan).page_bytes if selected else in_place,
        summary_bytes=windows[-1].metadata_bytes if selected else 0.0,
        selects=selected > 0,
    )
    step = step_time(load, shape, gpu)
    num_prompt_tokens = sum(one.prompt_tokens_per_s * one.window_s for one in windows)
    prompt_rate = gpu.matmul_flop_per_s * ENGINE_COSTS.prompt_frac
    prompt_s = prompt_flop(shape, 1) * num_prompt_tokens / num_steps / prompt_rate
    return {
        "floor_hbm_s": step.weights_s + step.kv_s,
        "floor_compute_s": step.arithmetic_s + prompt_s,
        "floor_latency_s": step.latency_s,
    }


def _geometry(plan: StartPlan) -> Geometry:
    spec = plan.spec
    return Geometry.of(plan.model.shape, dtype=spec.dtype, page_size=spec.knobs.page_size)


def _with_history(store: Store, key: ProfileKey, verdict: Verdict, *, knobs: Knobs) -> Explanation:
    tested = [one for one in store.list_acceptances() if one.key == key]
    ended = [one for one in store.list_rollouts(key) if one.state in ENDS]
    return Explanation(
        verdict=verdict,
        remedies=remedies(verdict, knobs) if knobs.is_profiled else (),
        advised=store.list_decisions(key)[:NUM_SHOWN],
        tried=tuple(_change(one) for one in tested[:NUM_SHOWN]),
        rollouts=tuple(ended[:NUM_SHOWN]),
    )


def _change(decision: AcceptanceDecision) -> TriedChange:
    return TriedChange(
        decision_id=decision.decision_id,
        decided_at=decision.decided_at,
        state=decision.verdict.state,
        values=changed(decision.config_from, decision.config_to),
        words=in_words(decision.verdict, rule=decision.rule),
    )


def changed(
    before: Mapping[str, KnobValue], after: Mapping[str, KnobValue]
) -> dict[str, KnobValue]:
    """Values of ``after`` that ``before`` does not have, or has otherwise."""
    return {
        name: after[name] for name in after if name not in before or after[name] != before[name]
    }
