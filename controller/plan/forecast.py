"""One configuration on one GPU: what fits by which gate, what a step takes, what requests see.

The planner sizes the memory, the gates of the engine say how many requests fit, the roofline of the
tuner says how long all of it takes. Nothing is measured and nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from sparsed.core import (
    BLOCK_TOKENS,
    DTYPE_BYTES,
    Bound,
    GpuRates,
    Knobs,
    KnobValue,
    MachineFacts,
    ModelShape,
    Slo,
    SparseMethod,
)
from sparsed.engine.admission import (
    Gate,
    Room,
    dram_gate,
    expected_claim,
    expected_misses,
    hot_gate,
    link_gate,
)
from sparsed.engine.hit_curve import Learned
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.measure.points import weights_read_bytes
from sparsed.engine.pace import Pace
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.workspace import plan_workspace
from sparsed.tuner.queueing import Job, Service, at_rate, full_batch
from sparsed.tuner.roofline import (
    HbmPeak,
    StepLoad,
    StepTime,
    hbm_peak,
    prompt_time_s,
    step_time,
)

DEVICE = "cuda:0"
# Of misses, over the stride of retrieval: 0.63, 0.4 and 0.25 of them are left at strides of 2, 4 and 8
# (benchmarks/results/retrieval-stride.json, h100-retrieval-stride.json).
STRIDE_EXPONENT: Final = -2 / 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A model and the GPU it would run on. ``learned``: the misses that are expected."""

    shape: ModelShape
    dtype: str
    gpu: GpuRates
    machine: MachineFacts
    learned: Learned


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Requests like each other: a prompt of ``context`` tokens, then ``output_tokens``.
    ``rate_per_s`` None: as many at once as fit."""

    context: int
    output_tokens: int
    slo: Slo
    rate_per_s: float | None = None

    @property
    def request_tokens(self) -> int:
        return self.context + self.output_tokens

    @property
    def middle_tokens(self) -> int:
        """Length of a request halfway through its output."""
        return self.context + self.output_tokens // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Requests at once that each gate lets in, and the rows there are. 0: not even one."""

    hbm: int
    dram: int
    link: int
    rows: int

    @property
    def at_once(self) -> int:
        return min(self.hbm, self.dram, self.link, self.rows)

    @property
    def binding(self) -> str:
        """Of the limits the least, in words."""
        words = {
            "the hot tier in HBM": self.hbm,
            "the DRAM tier": self.dram,
            "the link": self.link,
            "max_num_active_seqs": self.rows,
        }
        return min(words, key=words.__getitem__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is predicted of one configuration. ``bound``: of a step, or of the whole where prompts
    take most of the time; ``service``: at the rate of the traffic, else with the batch full."""

    method: str
    knobs: Knobs
    hbm: HbmPeak
    hbm_peak_bytes: int  # their sum
    dram_bytes: int
    needed_dram_bytes: int  # by as many requests as run at most
    limits: Limits
    resident_tokens: int  # of a lane in the hot tier, each request alike
    selects: bool  # False: steps attend to everything
    miss_frac: float  # of the pages selected
    hbm_bytes: float  # of a step
    link_bytes: float
    step: StepTime
    step_s: float
    prompt_s: float
    service: Service
    most: Service  # with the batch full
    keeps_up: bool  # with the rate of the traffic
    bound: Bound


class Configuration:
    """Knobs and memory of one choice of method and chunk, and the steps it would make."""

    def __init__(self, place: Place, traffic: Traffic, *, asked: Mapping[str, KnobValue]) -> None:
        """Errors: InputError or StartError of the planner where it does not fit."""
        self.place, self.traffic = place, traffic
        length = {"max_model_len": traffic.request_tokens}
        self.knobs = resolve_knobs(
            {**length, **asked},
            shape=place.shape,
            machine=place.machine,
            device=DEVICE,
            dtype=place.dtype,
        )
        self.method = SparseMethod(self.knobs.sparse_method)
        self.memory = plan_memory(self.knobs, shape=place.shape, dtype=place.dtype)
        self.geometry = Geometry.of(place.shape, dtype=place.dtype, page_size=self.knobs.page_size)
        self.lane_blocks = (self.memory.num_blocks - 1) // self.geometry.num_lanes
        self.hot_pages = self.lane_blocks * self.geometry.page_rows_per_frame
        self.claim = expected_claim(
            traffic.request_tokens,
            method=self.method,
            token_budget=self.knobs.token_budget,
            geometry=self.geometry,
            lane_blocks=self.lane_blocks,
            learned=place.learned,
        )
        self.workspace = plan_workspace(self.knobs, shape=place.shape, dtype=place.dtype)
        self.rows = self.knobs.max_num_active_seqs
        self.limits = self._find_limits()

    @property
    def is_hot(self) -> bool:
        """Whether one dense request lies in the hot tier from end to end, as it must."""
        return self.method is not SparseMethod.DENSE or (
            num_frames(self.traffic.request_tokens) <= self.lane_blocks
        )

    def _find_limits(self) -> Limits:
        """Requests that each gate would let in if it were the only one."""
        if not self.is_hot:
            return Limits(hbm=0, dram=0, link=0, rows=self.rows)
        return Limits(
            hbm=self._most(hot_gate),
            dram=self._most(dram_gate),
            link=self._most(link_gate),
            rows=self.rows,
        )

    @property
    def job(self) -> Job:
        """A request of the traffic with nothing beside it."""
        return Job(
            prompt_s=prompt_time_s(
                self.place.shape, self.place.gpu, num_tokens=self.traffic.context
            ),
            chunks=self.traffic.context / self.knobs.prefill_chunk,
            output_tokens=self.traffic.output_tokens,
        )

    @property
    def request_blocks(self) -> int:
        """Blocks of a lane that one request may hold."""
        budget = self.knobs.hbm_budget
        return self.lane_blocks if budget is None else min(num_frames(budget), self.lane_blocks)

    def misses(self, requests: int) -> float:
        """Pages that those requests miss in a step if the hot tier is theirs alone."""
        if self.method is SparseMethod.DENSE:
            return 0.0
        theirs = requests * self.request_blocks * self.geometry.page_rows_per_frame
        room = replace(self._room(requests), hot_pages=min(self.hot_pages, theirs))
        return expected_misses([self.claim] * requests, room)

    def step(self, requests: int) -> StepTime:
        """A decode step of ``requests``, halfway through their outputs."""
        return self._best(requests)[1]

    def forecast(self, requests: int) -> Forecast:
        """With at most ``requests`` at once: so many, or what the traffic's rate makes of it."""
        job = self.job
        most = full_batch(job, requests=requests, step_s=self.step(requests).step_s)
        service: Service | None = most
        if self.traffic.rate_per_s is not None:
            service = at_rate(
                job,
                rate_per_s=self.traffic.rate_per_s,
                most=requests,
                step_s=lambda number: self.step(number).step_s,
            )
        return self._told(job, most=most, service=service)

    def _told(self, job: Job, *, most: Service, service: Service | None) -> Forecast:
        seen = service or most
        load, step = self._best(seen.requests)
        pages = seen.requests * self.claim.curve.selected
        peak = hbm_peak(self.memory, workspace_bytes=self.workspace.total_bytes)
        return Forecast(
            method=self.method.value,
            knobs=replace(self.knobs, max_num_active_seqs=most.requests),
            hbm=peak,
            hbm_peak_bytes=peak.total_bytes,
            dram_bytes=self.memory.dram_pool_bytes,
            needed_dram_bytes=most.requests * self.claim.frames * self.geometry.frame_bytes,
            limits=self.limits,
            resident_tokens=min(
                self.traffic.request_tokens, self.lane_blocks * BLOCK_TOKENS // seen.requests
            ),
            selects=load.selects,
            miss_frac=load.link_bytes / self.geometry.page_bytes / pages,
            hbm_bytes=load.hbm_bytes,
            link_bytes=load.link_bytes,
            step=step,
            step_s=step.step_s,
            prompt_s=job.prompt_s,
            service=seen,
            most=most,
            keeps_up=service is not None,
            bound=Bound.COMPUTE if seen.prompt_frac > 0.5 else step.bound,
        )

    def _best(self, requests: int) -> tuple[StepLoad, StepTime]:
        """Selecting, or attending in place where all is hot and that is faster."""
        blocks = num_frames(self.traffic.request_tokens)
        hot = requests * blocks <= self.lane_blocks and blocks <= self.request_blocks
        loads = [self._dense_load(requests)]
        if self.method is not SparseMethod.DENSE and self._selects:
            selecting = self._sparse_load(requests)
            loads = [selecting, *loads] if hot else [selecting]
        told = [(load, step_time(load, self.place.shape, self.place.gpu)) for load in loads]
        return min(told, key=lambda pair: pair[1].step_s)

    @property
    def _selects(self) -> bool:
        return self.traffic.middle_tokens > self.knobs.token_budget

    def _dense_load(self, requests: int) -> StepLoad:
        shape, dtype = self.place.shape, self.place.dtype
        kv_tokens = requests * self.traffic.middle_tokens
        return StepLoad(
            requests=requests,
            weights_bytes=weights_read_bytes(shape, dtype=dtype),
            element_bytes=DTYPE_BYTES[dtype],
            kv_bytes=float(kv_tokens * shape.kv_bytes_per_token(dtype)),
        )

    def _sparse_load(self, requests: int) -> StepLoad:
        per_frame = self.geometry.summary_bytes_per_frame(self.knobs.sparse_method)
        dense = self._dense_load(requests)
        dense_frac = self.knobs.dense_layers / self.place.shape.num_layers
        selected_frac = self.knobs.token_budget / self.traffic.middle_tokens
        stride = min(self.knobs.retrieval_stride, self.knobs.page_size)
        ranked_bytes = requests * num_frames(self.traffic.middle_tokens) * per_frame
        return replace(
            dense,
            kv_bytes=dense.kv_bytes * (dense_frac + (1 - dense_frac) * selected_frac),
            summary_bytes=ranked_bytes / stride,
            link_bytes=self.misses(requests) * self.geometry.page_bytes * stride**STRIDE_EXPONENT,
            selects=True,
        )

    def _room(self, requests: int) -> Room:
        """What those that run leave to one more."""
        return Room(
            hot_pages=self.hot_pages,
            free_frames=self.memory.num_frames - requests * self.claim.frames,
            free_rows=1,
        )

    def _most(self, gate: Gate) -> int:
        """The most requests that the gate lets in, one after the other."""
        for number in range(self.rows):
            room = self._room(number)
            if gate is link_gate:
                room = replace(room, slack_pages=self._slack_pages(number + 1))
            if gate([self.claim] * number, self.claim, room) is not None:
                return number
        return self.rows

    def _slack_pages(self, requests: int) -> float | None:
        load = replace(self._best(requests)[0], link_bytes=0.0)
        step = step_time(load, self.place.shape, self.place.gpu)
        return Pace(target_s=self.traffic.slo.tpot_s, step_s=step.step_s).slack_pages(
            bytes_per_s=self.place.gpu.link_bytes_per_s, page_bytes=self.geometry.page_bytes
        )
