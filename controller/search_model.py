"""What is known of a configuration before ``sparsed tune`` tries it.

The planner says whether an engine could start with it and what memory it takes, the roofline what to
expect of a workload. Nothing is measured here; the search learns how far all of it is off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

from sparsed.controller.plan.forecast import Configuration, Place, Traffic
from sparsed.controller.plan.gpus import gpu_of
from sparsed.controller.plan.request import with_calibration
from sparsed.controller.startup import StartPlan, check_next_start
from sparsed.core import (
    BLOCK_TOKENS,
    GpuRates,
    InputError,
    Knobs,
    KnobValue,
    LinkCalibration,
    Objective,
    Slo,
    StartError,
    Workload,
)
from sparsed.engine.hit_curve import Learned
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.link_policy import choose_load
from sparsed.engine.planner import HBM_MARGIN_FRAC, plan_memory
from sparsed.engine.workspace import plan_workspace
from sparsed.tuner.beliefs import Expectation, Prior, expect_nothing
from sparsed.tuner.constrained import MemoryLimit
from sparsed.tuner.objective import ANSWER_TOKENS, MAX_HBM_FRAC, MAX_LINK_BUSY_FRAC
from sparsed.tuner.policy import Constraint
from sparsed.tuner.queueing import all_at_once
from sparsed.tuner.roofline import hbm_peak
from sparsed.tuner.space import SearchSpace, build_space

UNKNOWN_PROGRAMS: Final = 32  # before the first engine has calibrated its link


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchModel:
    """``memory`` None: there is no device memory to run out of. ``description``: for the user."""

    prior: Prior
    memory: MemoryLimit | None
    description: str


def search_model(
    plan: StartPlan,
    workload: Workload,
    *,
    objective: Objective,
    slo: Slo,
    calibration: LinkCalibration | None,
) -> SearchModel:
    """The prior and the bound on memory for trials of ``workload`` that begin at ``plan``.

    ``calibration`` of the link: its rate instead of that of the table of GPUs. A GPU that the table
    lacks, and every CPU, has no rates and so no prior; ``description`` says so.
    """
    if plan.spec.device == "cpu":
        words = "no analytic prior: the rates of a CPU are not known"
        return SearchModel(prior=expect_nothing, memory=None, description=words)
    memory = memory_limit(plan)
    try:
        gpu = gpu_of(plan.machine)
    except InputError:
        words = f"no analytic prior: the rates of {plan.machine.gpu_name} are not known"
        return SearchModel(prior=expect_nothing, memory=memory, description=words)
    roofline = Roofline(
        plan, workload, objective=objective, slo=slo, gpu=gpu, calibration=calibration
    )
    source = "measured" if gpu.is_measured else "scaled from data sheets"
    link = "measured here" if calibration is not None else "from the table"
    words = f"analytic prior: rates of {gpu.name}, {source}; of its link, {link}"
    return SearchModel(prior=roofline.expect, memory=memory, description=words)


def search_space(
    plan: StartPlan,
    *,
    fixed: AbstractSet[str],
    workload: Workload,
    calibration: LinkCalibration | None = None,
) -> SearchSpace:
    """What a study of ``workload`` on this machine tries; ``fixed``: knobs that were given;
    ``calibration``: of the link, if it is known yet."""
    knobs, whole_tokens = plan.spec.knobs, hot_tokens(plan)
    share = whole_tokens // knobs.max_num_active_seqs  # what the closed form gives each request
    return build_space(
        knobs,
        auto_hbm_budget=min(max(share, knobs.token_budget), knobs.max_model_len),
        fixed=fixed,
        workload=workload,
        hot_tokens=whole_tokens,
        auto_copy_programs=load_programs(plan, calibration),
        is_planned=cache(partial(can_start, plan)),
    )


def load_programs(plan: StartPlan, calibration: LinkCalibration | None) -> int | None:
    """Programs that load pages where the knob is on auto; None on a CPU, where none do."""
    if plan.spec.device == "cpu":
        return None
    size = Geometry.of(
        plan.model.shape, dtype=plan.spec.dtype, page_size=plan.spec.knobs.page_size
    ).page_bytes
    entry = calibration and choose_load(calibration, piece_bytes=size)
    return entry.programs if entry else UNKNOWN_PROGRAMS


def can_start(plan: StartPlan, knobs: Knobs) -> bool:
    """Whether an engine like that of ``plan`` could start with ``knobs``, by the planner."""
    try:
        check_next_start(plan, _asked(knobs))
    except (InputError, StartError):
        return False
    return True


def hot_tokens(plan: StartPlan) -> int:
    """Tokens of whole requests that the hot tier of ``plan`` has blocks for; one block is nobody's."""
    return (plan.spec.plan.num_blocks - 1) // plan.model.shape.num_lanes * BLOCK_TOKENS


def memory_limit(plan: StartPlan) -> MemoryLimit:
    """What was free before anything was loaded, by the planner's sum for each configuration. The
    default is the measure where it is planned to take more: it is always the first trial."""
    machine, spec = plan.machine, plan.spec
    margin = HBM_MARGIN_FRAC * machine.hbm_total_bytes

    def predict(values: Mapping[str, KnobValue]) -> float:
        """Infinite where the planner refuses."""
        try:
            return float(_peak_bytes(plan, spec.knobs.with_values(values)))
        except InputError:
            return math.inf

    return MemoryLimit(
        predict=predict,
        limit_bytes=max(machine.hbm_free_bytes, predict({}) + margin),
        margin_bytes=margin,
    )


class Roofline:
    """Expects of a workload what it would be if its requests were all like their mean and came
    together. Every token of an answer counts its context, so that long answers weigh more."""

    def __init__(
        self,
        plan: StartPlan,
        workload: Workload,
        *,
        objective: Objective,
        slo: Slo,
        gpu: GpuRates,
        calibration: LinkCalibration | None,
    ) -> None:
        self._plan = plan
        self._objective = objective
        self._gpu = gpu
        self._calibration = calibration
        requests = workload.requests
        output_tokens = sum(item.output_tokens for item in requests)
        weighted = sum(item.input_tokens * item.output_tokens for item in requests)
        self._count = len(requests)
        self._traffic = Traffic(
            context=max(1, round(weighted / output_tokens)),
            output_tokens=max(1, round(output_tokens / len(requests))),
            slo=slo,
        )
        self._of = cache(self._compute)

    def expect(self, values: Mapping[str, KnobValue]) -> Expectation:
        """Of the default changed by ``values``. Nothing of what the planner refuses."""
        try:
            return self._of(self._plan.spec.knobs.with_values(values))
        except (InputError, StartError):
            return Expectation()

    def _compute(self, knobs: Knobs) -> Expectation:
        traffic = self._traffic
        config = Configuration(self._place(knobs), traffic, asked=_asked(knobs))
        at_once = max(1, min(config.limits.at_once, self._count))
        step = config.step(at_once)
        burst = all_at_once(config.job, count=self._count, at_once=at_once, step_s=step.step_s)
        waves = math.ceil(self._count / at_once)
        link_s = waves * config.job.decode_steps * step.link_s
        figures = {Constraint.TTFT: burst.mean_ttft_s, Constraint.TPOT: burst.mean_tpot_s}
        targets = {Constraint.TTFT: traffic.slo.ttft_s, Constraint.TPOT: traffic.slo.tpot_s}
        late = {name: figures[name] / target - 1.0 for name, target in targets.items() if target}
        always = {
            Constraint.HBM: self._hbm_frac(knobs) / MAX_HBM_FRAC - 1.0,
            Constraint.LINK: link_s / burst.total_s / MAX_LINK_BUSY_FRAC - 1.0,
        }
        rate = math.log(self._count / burst.total_s)
        if self._objective is Objective.GOODPUT:
            # No request is late in the mean alone: fewer are good the later they are.
            lost = sum(math.log1p(max(0.0, slack)) for slack in late.values())
            return Expectation(objective=rate - lost, slacks=always)
        throughput = rate + math.log(traffic.output_tokens)
        answer_s = burst.mean_ttft_s + (ANSWER_TOKENS - 1) * burst.mean_tpot_s
        expected = {
            Objective.THROUGHPUT: throughput,
            Objective.LATENCY: -math.log(answer_s),
            Objective.BALANCED: (throughput - math.log(answer_s)) / 2,
        }
        # Capacity is over the hot bytes that a run comes to, of which no sum tells beforehand.
        return Expectation(objective=expected.get(self._objective, 0.0), slacks=always | late)

    def _hbm_frac(self, knobs: Knobs) -> float:
        machine = self._plan.machine
        others = machine.hbm_total_bytes - machine.hbm_free_bytes
        return (others + _peak_bytes(self._plan, knobs)) / machine.hbm_total_bytes

    def _place(self, knobs: Knobs) -> Place:
        plan, gpu = self._plan, self._gpu
        shape, dtype = plan.model.shape, plan.spec.dtype
        if self._calibration is not None:
            gpu = with_calibration(
                gpu,
                self._calibration,
                shape=shape,
                dtype=dtype,
                page_size=knobs.page_size,
                programs=knobs.copy_programs,
            )
        return Place(shape=shape, dtype=dtype, gpu=gpu, machine=plan.machine, learned=Learned())


def _peak_bytes(plan: StartPlan, knobs: Knobs) -> int:
    """InputError of the planner where not one request fits."""
    shape, dtype = plan.model.shape, plan.spec.dtype
    workspace = plan_workspace(knobs, shape=shape, dtype=dtype)
    memory = plan_memory(knobs, shape=shape, dtype=dtype)
    return hbm_peak(memory, workspace_bytes=workspace.total_bytes).total_bytes


def _asked(knobs: Knobs) -> dict[str, KnobValue]:
    """As a start is asked for them: what is auto is not asked for."""
    return {name: value for name, value in knobs.as_dict().items() if value is not None}
