"""What a decode step, a prompt and the memory of a configuration come to, from bytes and rates.

A prior for a search and a bound on memory, never a measurement. Pure: the caller brings the numbers
of the planner, of the hit curve and of the GPU. How far it is from what was measured stands in
docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sparsed.core import Bound, GpuRates, MemoryPlan, ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCosts:
    """What this engine makes of a GPU's rates. ``product_frac`` of the rate of a copy: weights, in
    the products of a few rows; ``kv_frac``: keys, values and summaries; ``prompt_frac`` of the rate
    of large products. ``request_layer_s``: of each request and layer of a step; ``select_layer_s``:
    the chain of small kernels of a layer that selects."""

    product_frac: float
    kv_frac: float
    prompt_frac: float
    request_layer_s: float
    select_layer_s: float


# Fitted by benchmarks/model_error.py to steps and prompts of one model shape on one H100.
ENGINE_COSTS: Final = EngineCosts(
    product_frac=0.7714,
    kv_frac=0.9872,
    prompt_frac=0.7538,
    request_layer_s=0.409e-6,
    select_layer_s=39.94e-6,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """What one decode step of ``requests`` moves. ``weights_bytes``: those that a step reads, of
    which each element takes part in one product; ``kv_bytes``: K and V attended to;
    ``summary_bytes``: ranked, 0 where nothing is selected; ``link_bytes``: missed pages."""

    requests: int
    weights_bytes: int
    element_bytes: int
    kv_bytes: float
    summary_bytes: float = 0.0
    link_bytes: float = 0.0
    selects: bool = False

    @property
    def hbm_bytes(self) -> float:
        return self.weights_bytes + self.kv_bytes + self.summary_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of the parts of a step. ``floor_s``: the larger of its HBM bytes at the rate of a
    copy and its link bytes at that of the link."""

    weights_s: float  # products, where reading the weights takes longer than their arithmetic
    arithmetic_s: float  # products, where it is the other way round
    kv_s: float
    latency_s: float
    link_s: float
    floor_s: float

    @property
    def step_s(self) -> float:
        """The sum: little of a load is hidden behind the attention to what is there."""
        return self.weights_s + self.arithmetic_s + self.kv_s + self.latency_s + self.link_s

    @property
    def bound(self) -> Bound:
        parts = {
            Bound.HBM: self.weights_s + self.kv_s,
            Bound.LINK: self.link_s,
            Bound.COMPUTE: self.arithmetic_s,
            Bound.LATENCY: self.latency_s,
        }
        return max(parts, key=parts.__getitem__)


def step_time(
    load: StepLoad, shape: ModelShape, gpu: GpuRates, *, costs: EngineCosts = ENGINE_COSTS
) -> StepTime:
    """The parts of a decode step, which follow each other."""
    weights_s = load.weights_bytes / (gpu.copy_bytes_per_s * costs.product_frac)
    flop = 2.0 * load.requests * load.weights_bytes / load.element_bytes
    arithmetic_s = flop / (gpu.matmul_flop_per_s * costs.prompt_frac)
    by_bytes = weights_s >= arithmetic_s
    layer_s = load.requests * costs.request_layer_s + load.selects * costs.select_layer_s
    return StepTime(
        weights_s=weights_s if by_bytes else 0.0,
        arithmetic_s=0.0 if by_bytes else arithmetic_s,
        kv_s=(load.kv_bytes + load.summary_bytes) / (gpu.copy_bytes_per_s * costs.kv_frac),
        latency_s=shape.num_layers * layer_s,
        link_s=load.link_bytes / gpu.link_bytes_per_s,
        floor_s=max(load.hbm_bytes / gpu.copy_bytes_per_s, load.link_bytes / gpu.link_bytes_per_s),
    )


def prompt_flop(shape: ModelShape, num_tokens: int) -> float:
    """Arithmetic of a prompt: twice the parameters of the layers for each token, and causal
    attention, where a pair of query and key takes four operations for each dim of each head. The
    logits of its one last token are left out."""
    tables = 1 if shape.tied_embeddings else 2
    in_layers = shape.num_parameters - tables * shape.vocab_size * shape.hidden_size
    pairs = num_tokens * (num_tokens + 1) / 2
    attention = 4.0 * pairs * shape.num_layers * shape.num_heads * shape.head_dim
    return 2.0 * in_layers * num_tokens + attention


def prompt_time_s(
    shape: ModelShape, gpu: GpuRates, *, num_tokens: int, costs: EngineCosts = ENGINE_COSTS
) -> float:
    """Of a prompt with nothing beside it, in large chunks: small ones reach less of the rate, which
    is not modelled."""
    return prompt_flop(shape, num_tokens) / (gpu.matmul_flop_per_s * costs.prompt_frac)


@dataclass(frozen=True, kw_only=True, slots=True)
class HbmPeak:
    """Bytes of device memory by owner while the engine is under load."""

    weights_bytes: int
    hot_pages_bytes: int
    summaries_bytes: int
    tables_bytes: int
    staging_bytes: int
    prefill_buffer_bytes: int
    workspace_bytes: int  # CUDA context, graphs, activations, logits

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.hot_pages_bytes
            + self.summaries_bytes
            + self.tables_bytes
            + self.staging_bytes
            + self.prefill_buffer_bytes
            + self.workspace_bytes
        )


def hbm_peak(plan: MemoryPlan, *, workspace_bytes: int) -> HbmPeak:
    """The planner's parts, and its allowance for everything besides weights and KV."""
    return HbmPeak(
        weights_bytes=plan.weights_bytes,
        hot_pages_bytes=plan.hot_pages_bytes,
        summaries_bytes=plan.summaries_bytes,
        tables_bytes=plan.tables_bytes,
        staging_bytes=plan.staging_bytes,
        prefill_buffer_bytes=plan.prefill_buffer_bytes,
        workspace_bytes=workspace_bytes,
    )
