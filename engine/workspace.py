"""Device memory that is neither weights nor KV: who takes it, from the shapes of what is computed.

What torch has reserved is counted, not what tensors hold: its allocator keeps a segment of memory
for every large tensor, and joins none, so that what is freed serves only what is smaller. Free of
torch. ``benchmarks/memory_error.py`` holds the sum against a daemon; the constants are fitted to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sparsed.core import BLOCK_TOKENS, DTYPE_BYTES, Knobs, ModelShape, SparseMethod
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.scheduler import LOGPROBS_CHUNK_TOKENS
from sparsed.engine.step_graphs import IN_PLACE, SELECTING, graph_sizes, most_pages

FLOAT32: Final = 4
INT32: Final = 4
INT64: Final = 8
DRIVER_BYTES: Final = 1024 << 20  # context, modules of all libraries and kernels, their handles
GRAPH_BYTES: Final = 5 << 20  # of a recorded step, besides what it computes on the way
PRODUCTS_BYTES: Final = 32 << 20  # of cuBLAS, for each stream it has been called on
TOKEN_INDEX_BYTES: Final = 64  # ids, positions, offsets and logits' places of a prompt token


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Bytes by owner. ``steps_bytes``: buffers of decode steps and what their graphs compute on the
    way; ``sampling_bytes``: logits, what is drawn from them, and counts of tokens;
    ``prompt_bytes``: what a prompt chunk, or all its logprobs, leaves reserved."""

    driver_bytes: int
    graphs_bytes: int
    steps_bytes: int
    sampling_bytes: int
    prompt_bytes: int

    @property
    def total_bytes(self) -> int:
        return (
            self.driver_bytes
            + self.graphs_bytes
            + self.steps_bytes
            + self.sampling_bytes
            + self.prompt_bytes
        )


def plan_workspace(knobs: Knobs, *, shape: ModelShape, dtype: str) -> Workspace:
    """What an engine with these knobs takes at most."""
    return workspace(
        shape,
        dtype=dtype,
        chunk=knobs.prefill_chunk,
        num_seqs=knobs.max_num_seqs,
        page_size=knobs.page_size,
        max_tokens=knobs.max_model_len,
        selects=knobs.sparse_method != SparseMethod.DENSE,
    )


def workspace(
    shape: ModelShape,
    *,
    dtype: str,
    chunk: int,
    num_seqs: int,
    page_size: int,
    max_tokens: int,
    selects: bool,
) -> Workspace:
    """What an engine takes at most with prompts in chunks of ``chunk`` tokens and ``num_seqs``
    rows of up to ``max_tokens`` tokens. ``selects``: decode steps rank pages."""
    element = DTYPE_BYTES[dtype]
    kinds = 1 + len(SELECTING) if selects else len([IN_PLACE])
    products = 2 * PRODUCTS_BYTES  # of prompts, and of recorded steps
    steps = _trail_bytes(shape, element) + _select_bytes(
        shape, page_size=page_size, max_tokens=max_tokens
    )
    return Workspace(
        driver_bytes=DRIVER_BYTES,
        graphs_bytes=len(graph_sizes(num_seqs)) * kinds * GRAPH_BYTES,
        steps_bytes=products + num_seqs * (steps if selects else 0),
        # Logits of a step in the model's dtype and in float32, those of penalties, two counts.
        sampling_bytes=num_seqs * shape.vocab_size * (element + 2 * FLOAT32 + FLOAT32 + 1),
        prompt_bytes=_prompt_bytes(shape, element, chunk=chunk),
    )


def prompt_token_bytes(shape: ModelShape, element: int) -> int:
    """What the layers reserve for a prompt token. Attention: the normed state, Q, K and V, two
    outputs and the first partial one; then what merges partial outputs in float32, or the MLP's
    gate, up and product, whichever is larger: each takes what the other has freed."""
    q_size = shape.num_heads * shape.head_dim
    kv_size = shape.num_kv_heads * shape.head_dim
    attention = (2 * shape.hidden_size + q_size + 2 * kv_size + 3 * q_size) * element
    merges = 2 * q_size * FLOAT32 + q_size * element + 3 * shape.num_heads * FLOAT32
    mlp = 3 * shape.intermediate_size * element
    slots = 2 * (shape.num_lanes + shape.num_kv_heads) * INT32
    rotation = 4 * shape.head_dim * FLOAT32
    return attention + max(merges, mlp) + slots + rotation + TOKEN_INDEX_BYTES


def _prompt_bytes(shape: ModelShape, element: int, *, chunk: int) -> int:
    """All logprobs of a prompt come from few tokens at a time, each with a row of logits in the
    model's dtype and three times in float32; of a large chunk they fit what its MLP has freed, but
    for what is left at the end of a segment."""
    logits = LOGPROBS_CHUNK_TOKENS * shape.vocab_size
    freed = max(0, chunk * 2 * shape.intermediate_size * element - logits * FLOAT32)
    logprobs = max(0, logits * (element + 3 * FLOAT32) - freed)
    return chunk * prompt_token_bytes(shape, element) + logprobs


def _trail_bytes(shape: ModelShape, element: int) -> int:
    """Of a row: queries of all layers, and the logs of the softmax sums."""
    return shape.num_layers * shape.num_heads * (shape.head_dim * element + FLOAT32)


def _select_bytes(shape: ModelShape, *, page_size: int, max_tokens: int) -> int:
    """Of a row: selected pages and their slots, where misses come from and go to; the pages of all
    lanes that a stride of retrieval keeps, whether there is one or may come; and in a step a logit
    of each page and query head."""
    count = most_pages(page_size=page_size, max_tokens=max_tokens)
    lists = shape.num_kv_heads * count * 2 * (INT32 + INT64) + shape.num_lanes * count * INT32
    pages = num_frames(max_tokens) * BLOCK_TOKENS // page_size
    return lists + shape.num_heads * pages * FLOAT32
