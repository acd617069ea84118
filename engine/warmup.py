"""A request before the first one, so that no request waits for a compiler."""

from __future__ import annotations

from typing import Protocol

from sparsed.core import BLOCK_TOKENS, Knobs, SparseMethod
from sparsed.engine.assembly import Progress
from sparsed.engine.attention import Attention
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.measure.ceilings import give_back_memory
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.recall import RecallSampler
from sparsed.engine.recorder import Drawn

NUM_CHUNKS = 2  # the second one has a context
NUM_STEPS = 2


class Runs(Protocol):
    """What a warm-up needs of a runner."""

    decoder: Decoder
    kv: KVCache
    attention: Attention
    recall: RecallSampler

    def run(self, plan: StepPlan) -> Drawn: ...


def warm_up(runner: Runs, knobs: Knobs, *, on_progress: Progress) -> None:
    """Compute a prompt of two chunks and some tokens, and have attention measure the backends for
    the shapes of whole chunks. Nothing stays in the cache; the copies it made stay counted."""
    on_progress("warming up", 0.0)
    kv = runner.kv
    chunk = min(knobs.prefill_chunk, knobs.max_model_len - NUM_STEPS)
    while chunk and not _fits(kv, NUM_CHUNKS * chunk + NUM_STEPS, knobs):
        chunk //= 2
    if chunk > BLOCK_TOKENS:
        chunk -= chunk % BLOCK_TOKENS  # as the scheduler cuts them
    if chunk == 0:
        return
    config = runner.decoder.config
    group = config.num_heads // config.num_kv_heads
    runner.attention.warm_up(chunk, max_tokens=knobs.max_model_len, group=group)
    give_back_memory(kv.arena.pages_NX.device)  # segments of other sizes than chunks ask for
    on_progress("warming up", 0.5)
    length = NUM_CHUNKS * chunk
    row = kv.add(length + NUM_STEPS, method=SparseMethod.DENSE, token_budget=None)
    for start in range(0, length, chunk):
        part = PromptChunk(
            row=row,
            tokens=(0,) * chunk,
            start=start,
            prompt_length=length,
            logits_from=min(length - 1, start + chunk),
        )
        runner.run(StepPlan(chunks=(part,), decodes=()))
    for position in range(length, length + NUM_STEPS):
        decode = DecodeRow(row=row, token=0, position=position)
        runner.run(StepPlan(chunks=(), decodes=(decode,)))
    runner.recall.warm_up(decode, num_query_heads=config.num_heads)
    kv.free(row)


def _fits(kv: KVCache, num_tokens: int, knobs: Knobs) -> bool:
    return num_tokens <= knobs.max_model_len and kv.can_admit(
        num_tokens, method=SparseMethod.DENSE, token_budget=None
    )
