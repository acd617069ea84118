"""Device memory besides weights and KV: every part from the shapes that need it."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from segments import MIB, Chunks, Segments

from sparsed.core import PAGE_SIZES, ModelShape
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.workspace import Workspace, prompt_token_bytes, workspace

LLAMA = dummy_config("dummy:llama-3.1-8b").shape
ELEMENT = 2  # bytes of bfloat16


def of(
    *,
    shape: ModelShape = LLAMA,
    chunk: int = 8192,
    num_seqs: int = 8,
    page_size: int = 8,
    max_tokens: int = 131_072,
    selects: bool = True,
) -> Workspace:
    return workspace(
        shape,
        dtype="bfloat16",
        chunk=chunk,
        num_seqs=num_seqs,
        page_size=page_size,
        max_tokens=max_tokens,
        selects=selects,
    )


@given(
    chunk=st.integers(16, 32_768),
    more=st.integers(1, 32_768),
    num_seqs=st.integers(1, 512),
    page_size=st.sampled_from(PAGE_SIZES),
    selects=st.booleans(),
)
def test_more_of_anything_never_takes_less(
    chunk: int, more: int, num_seqs: int, page_size: int, selects: bool
) -> None:
    sized = partial(of, page_size=page_size, selects=selects)
    small = sized(chunk=chunk, num_seqs=num_seqs)
    large = sized(chunk=chunk + more, num_seqs=num_seqs)
    assert small.total_bytes <= large.total_bytes
    assert replace(small, prompt_bytes=0) == replace(large, prompt_bytes=0)
    wide = sized(chunk=chunk, num_seqs=num_seqs + 1)
    assert all(few <= many for few, many in zip(*map(_parts, (small, wide)), strict=True))
    assert min(_parts(small)) > 0 and small.total_bytes == sum(_parts(small))


def _parts(found: Workspace) -> list[int]:
    return list(asdict(found).values())


def test_a_large_chunk_takes_what_its_layers_do_for_each_token() -> None:
    """All logprobs fit into it: nothing but the tokens counts."""
    per_token = prompt_token_bytes(LLAMA, ELEMENT)
    assert of(chunk=16_384).prompt_bytes == 16_384 * per_token
    tensors = ELEMENT * (
        LLAMA.hidden_size * 2  # hidden and normed
        + (LLAMA.num_heads + 2 * LLAMA.num_kv_heads) * LLAMA.head_dim
        + 3 * LLAMA.num_heads * LLAMA.head_dim  # outputs
        + 3 * LLAMA.intermediate_size  # gate, up and product
    )
    assert tensors < per_token < 1.05 * tensors


def test_merges_count_where_the_mlp_is_narrow() -> None:
    narrow = replace(LLAMA, intermediate_size=256)
    assert prompt_token_bytes(narrow, ELEMENT) > LLAMA.num_heads * LLAMA.head_dim * (4 + 2 * 4)
    wider = replace(LLAMA, intermediate_size=2 * LLAMA.intermediate_size)
    added = prompt_token_bytes(wider, ELEMENT) - prompt_token_bytes(LLAMA, ELEMENT)
    assert added == 3 * LLAMA.intermediate_size * ELEMENT


def test_all_logprobs_of_a_prompt_take_more_than_a_small_chunk() -> None:
    small = of(chunk=256)
    assert small.prompt_bytes > 256 * prompt_token_bytes(LLAMA, ELEMENT) + 256 * 2**20
    few_words = of(chunk=256, shape=replace(LLAMA, vocab_size=1000))
    assert few_words.prompt_bytes == 256 * prompt_token_bytes(LLAMA, ELEMENT)


@pytest.mark.parametrize("num_seqs", [1, 8, 64])
def test_dense_steps_rank_nothing(num_seqs: int) -> None:
    dense, sparse = of(num_seqs=num_seqs, selects=False), of(num_seqs=num_seqs)
    assert 6 * dense.graphs_bytes == sparse.graphs_bytes
    assert dense.steps_bytes == of(num_seqs=1, selects=False).steps_bytes < sparse.steps_bytes


def test_coarse_pages_take_less_to_rank() -> None:
    """A logit of every page and query head, and lists of what is selected."""
    logits = 64 * LLAMA.num_heads * 131_072 * 4
    fine, coarse = (of(num_seqs=64, page_size=size).steps_bytes for size in (8, 32))
    assert fine - coarse > logits // 8 - logits // 32 > 0


@pytest.mark.parametrize("chunk", [2048, 8192, 32_768])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_prompt_reserves_what_is_planned(chunk: int, narrow: bool) -> None:
    """By the rules of torch's allocator: never more, and not much less."""
    shape = replace(LLAMA, intermediate_size=1024) if narrow else LLAMA
    planned = chunk * prompt_token_bytes(shape, ELEMENT)
    reserved = _reserved(
        shape, chunk=chunk, lengths=[(chunk, at) for at in range(0, 131_072, chunk)]
    )
    assert reserved <= planned + MIB * 24, "small tensors share segments"
    assert reserved > 0.9 * planned


@given(
    sizes=st.sampled_from(
        (
            (1024, 3072, 16, 8, 128),
            (2048, 8192, 32, 8, 64),
            (2560, 9728, 32, 8, 128),
            (3584, 18_944, 28, 4, 128),
            (4096, 12_288, 32, 8, 128),
            (5120, 25_600, 64, 8, 128),
            (8192, 28_672, 64, 8, 128),
        )
    ),
    lengths=st.lists(
        st.tuples(st.integers(1, 4096), st.sampled_from((0, 100, 5000, 30_000))), max_size=8
    ),
)
def test_no_order_of_chunks_reserves_much_more(
    sizes: tuple[int, ...], lengths: list[tuple[int, int]]
) -> None:
    """Of models as they are published; of the small ones segments of 20 MiB are a part."""
    hidden, inner, heads, kv_heads, dim = sizes
    shape = replace(
        LLAMA,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
    )
    planned = 4096 * prompt_token_bytes(shape, ELEMENT)
    reserved = _reserved(shape, chunk=4096, lengths=[(4096, 30_000), *lengths])
    assert reserved <= 1.05 * planned + 64 * MIB


def _reserved(shape: ModelShape, *, chunk: int, lengths: list[tuple[int, int]]) -> int:
    """By chunks of (tokens, context), after a warm-up as the engine's: a chunk, and its second."""
    memory = Segments()
    chunks = Chunks(shape=shape, dtype="bfloat16", piece_tokens=8192)
    for num_tokens, context in [(chunk, 0), (chunk, chunk), *lengths]:
        chunks.run(memory, num_tokens=num_tokens, context=context)
    assert memory.held == 0 and memory.peak_held <= memory.reserved
    return memory.reserved
