"""What a decode measurement asks of the engine: lengths, room and bytes. Pure; free of torch."""

from __future__ import annotations

from typing import Final

from sparsed.core import (
    DTYPE_BYTES,
    DecodePoint,
    Knobs,
    MemoryPlan,
    ModelShape,
    SparseMethod,
)
from sparsed.engine.kvcache.geometry import num_frames

WARM_UP_STEPS: Final = 5
NUM_STEPS: Final = 40
AHEAD_STEPS: Final = WARM_UP_STEPS + NUM_STEPS // 2  # until the middle of the measurement
SPARE_TOKENS: Final = 40  # of the output: the second half of the steps, and those in flight


def lead_steps(point: DecodePoint, number: int, *, chunk_tokens: int) -> int:
    """Steps that the ``number``-th request decodes while the prompts after it are computed."""
    later_tokens = (point.requests - 1 - number) * point.tokens
    return -(-later_tokens // chunk_tokens)


def prompt_tokens(point: DecodePoint, number: int, *, chunk_tokens: int) -> int:
    """Length of the prompt of the ``number``-th request, such that all are equally long by the
    middle of the measurement: those that begin earlier are shorter."""
    lead = lead_steps(point, number, chunk_tokens=chunk_tokens)
    return max(1, point.tokens - lead - AHEAD_STEPS)


def total_tokens(point: DecodePoint, *, chunk_tokens: int) -> int:
    """Prompt and output of each request: enough that none ends before the measurement does."""
    lead = lead_steps(point, 0, chunk_tokens=chunk_tokens)
    longest = max(point.tokens, 1 + lead + AHEAD_STEPS)
    return longest + SPARE_TOKENS + lead // 4


def fits(point: DecodePoint, *, knobs: Knobs, plan: MemoryPlan, num_lanes: int) -> bool:
    """Whether all requests run at once. Dense ones must lie in the hot tier from end to end."""
    total = total_tokens(point, chunk_tokens=knobs.prefill_chunk)
    frames = num_frames(total)
    blocks = frames
    if knobs.sparse_method != SparseMethod.DENSE:
        blocks = min(frames, num_frames(knobs.token_budget) + 1)
    return (
        point.requests <= knobs.max_num_active_seqs
        and total <= knobs.max_model_len
        and point.requests * frames <= plan.num_frames
        and point.requests * blocks <= (plan.num_blocks - 1) // num_lanes
    )


def weights_read_bytes(shape: ModelShape, *, dtype: str) -> int:
    """Weights that every step reads: all but an embedding that is only looked up."""
    looked_up = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
    return (shape.num_parameters - looked_up) * DTYPE_BYTES[dtype]


def step_read_bytes(shape: ModelShape, *, dtype: str, kv_tokens: int) -> int:
    """Weights, and K and V of ``kv_tokens`` tokens, those of all requests together."""
    kv_bytes = kv_tokens * shape.kv_bytes_per_token(dtype)
    return weights_read_bytes(shape, dtype=dtype) + kv_bytes
