"""Sizes of both tiers: never more than asked, and what was asked for is never changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsed.core import (
    BLOCK_TOKENS,
    DTYPE_BYTES,
    GIB,
    KNOBS_BY_NAME,
    PAGE_SIZES,
    ExitCode,
    InputError,
    Knobs,
    KnobValue,
    MachineFacts,
    MemoryPlan,
    ModelShape,
    SparseMethod,
    StartError,
)
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import (
    HBM_MARGIN_FRAC,
    max_prefill_chunk,
    plan_memory,
    resolve_knobs,
)
from sparsed.engine.workspace import plan_workspace

LAPTOP = MachineFacts(
    cpu_name="any", num_cpus=8, dram_total_bytes=16 * GIB, dram_free_bytes=8 * GIB
)
H100 = MachineFacts(
    cpu_name="any",
    num_cpus=16,
    dram_total_bytes=128 * GIB,
    dram_free_bytes=120 * GIB,
    gpu_name="H100",
    num_gpus=1,
    hbm_total_bytes=80 * GIB,
    hbm_free_bytes=78 * GIB,
)
LLAMA = dummy_config("dummy:llama-3.1-8b").shape
TINY = dummy_config("dummy:tiny").shape

shapes = st.builds(
    ModelShape,
    num_layers=st.integers(1, 48),
    num_heads=st.just(32),
    num_kv_heads=st.sampled_from((1, 2, 8)),
    head_dim=st.sampled_from((16, 64, 128)),
    hidden_size=st.sampled_from((64, 4096)),
    intermediate_size=st.just(128),
    vocab_size=st.sampled_from((300, 128_000)),
    max_position=st.sampled_from((256, 8192, 131_072)),
    num_parameters=st.sampled_from((10**6, 10**9)),
    tied_embeddings=st.booleans(),
)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "page_size": st.sampled_from(PAGE_SIZES),
        "token_budget": st.sampled_from((512, 2048, 8192)),
        "hbm_budget": st.sampled_from((None, 8192, 32768)),
        "prefill_chunk": st.sampled_from((16, 512, 32768)),
        "sparse_method": st.sampled_from([method.value for method in SparseMethod]),
        "dense_layers": st.integers(0, 1),
        "max_num_seqs": st.sampled_from((1, 7, 1024)),
        "max_num_active_seqs": st.sampled_from((1, 8)),
        "kv_hbm_gib": st.sampled_from((0.001, 0.3, 2.0)),
        "kv_dram_gib": st.sampled_from((0.001, 0.3, 2.0)),
        "max_model_len": st.sampled_from((128, 250, 100_000)),
    },
)
machines = st.sampled_from(
    (
        ("cpu", LAPTOP),
        ("cpu", replace(LAPTOP, dram_free_bytes=5 * GIB)),
        ("cuda:0", H100),
        ("cuda:0", replace(H100, dram_free_bytes=GIB // 100, hbm_free_bytes=10 * GIB)),
    )
)


def plan(
    asked: Mapping[str, object],
    *,
    shape: ModelShape = LLAMA,
    machine: MachineFacts = H100,
    device: str = "cuda:0",
    dtype: str = "bfloat16",
) -> tuple[Knobs, MemoryPlan]:
    knobs = resolve_knobs(asked, shape=shape, machine=machine, device=device, dtype=dtype)
    return knobs, plan_memory(knobs, shape=shape, dtype=dtype)


@given(shape=shapes, asked=wishes, where=machines, dtype=st.sampled_from(("float32", "bfloat16")))
def test_a_plan_keeps_every_promise_or_names_a_knob(
    shape: ModelShape,
    asked: dict[str, KnobValue],
    where: tuple[str, MachineFacts],
    dtype: str,
) -> None:
    device, machine = where
    try:
        knobs, memory = plan(asked, shape=shape, machine=machine, device=device, dtype=dtype)
    except InputError as error:
        assert error.field in {*asked, "kv_hbm_gib", "kv_dram_gib"}, "tiers may be the machine's"
        assert str(error.field) in str(error)
        return
    except StartError as error:  # tied embeddings are held twice: they may not fit
        assert shape.tied_embeddings and "take a smaller model or dtype" in str(error)
        return
    assert {name: getattr(knobs, name) for name in asked} == asked
    parts = (
        memory.hot_pages_bytes,
        memory.summaries_bytes,
        memory.tables_bytes,
        memory.staging_bytes,
        memory.prefill_buffer_bytes,
    )
    assert min(parts) >= 0
    assert sum(parts) == memory.hot_bytes <= knobs.kv_hbm_gib * GIB
    assert memory.dram_pool_bytes <= knobs.kv_dram_gib * GIB
    geometry = Geometry.of(shape, dtype=dtype, page_size=knobs.page_size)
    assert memory.hot_pages_bytes == memory.num_blocks * geometry.block_bytes
    assert memory.dram_pool_bytes == memory.num_frames * geometry.frame_bytes
    assert memory.num_blocks >= 2 * geometry.num_lanes + 1, "an open page and one more a lane"
    assert knobs.max_model_len <= shape.max_position
    assert num_frames(knobs.max_model_len) <= memory.num_frames, "max_model_len always fits"


@given(shape=shapes, dtype=st.sampled_from(("float32", "bfloat16")))
def test_a_usual_machine_needs_no_wishes(shape: ModelShape, dtype: str) -> None:
    for machine, device in ((H100, "cuda:0"), (LAPTOP, "cpu")):
        knobs, memory = plan({}, shape=shape, machine=machine, device=device, dtype=dtype)
        assert knobs.max_num_seqs == knobs.max_num_active_seqs >= 1
        assert memory.max_tokens >= knobs.max_model_len


@given(shape=shapes, asked=wishes, free_gib=st.floats(4, 64))
def test_a_cpu_machine_is_not_promised_more_than_is_free(
    shape: ModelShape, asked: dict[str, KnobValue], free_gib: float
) -> None:
    assume(not asked.keys() & {"kv_hbm_gib", "kv_dram_gib"})
    free = int(free_gib * GIB)
    machine = replace(LAPTOP, dram_free_bytes=free)
    held_twice = shape.vocab_size * shape.hidden_size * shape.tied_embeddings
    weights = (shape.num_parameters + held_twice) * DTYPE_BYTES["float32"]
    try:
        _, memory = plan(asked, shape=shape, machine=machine, device="cpu", dtype="float32")
    except (InputError, StartError):
        return
    assert weights + memory.hot_bytes + memory.dram_pool_bytes <= free


def test_the_hot_tier_is_what_the_device_has_beside_the_weights() -> None:
    knobs, memory = plan({})
    assert memory.weights_bytes == LLAMA.num_parameters * 2
    room = H100.hbm_free_bytes - memory.weights_bytes
    assert 0.8 * room < memory.hot_bytes < room - GIB
    assert 90 * GIB < memory.dram_pool_bytes <= knobs.kv_dram_gib * GIB < 100 * GIB
    assert knobs.max_model_len == 131_072


@given(
    chunk=st.integers(16, 16384),
    hbm_gib=st.floats(20.0, 80.0),
    kv_gib=st.none() | st.floats(1.0, 40.0),
)
def test_the_largest_chunk_fits_what_was_free_and_one_more_token_does_not(
    chunk: int, hbm_gib: float, kv_gib: float | None
) -> None:
    free = int(hbm_gib * GIB)
    machine = replace(H100, hbm_free_bytes=free)
    asked = {"prefill_chunk": chunk} | ({} if kv_gib is None else {"kv_hbm_gib": kv_gib})
    try:
        knobs, memory = plan(asked, machine=machine)
    except (InputError, StartError):
        assume(False)
    most = max_prefill_chunk(knobs, memory, shape=LLAMA, machine=machine, dtype="bfloat16")
    assert chunk <= most <= 32768

    def taken(tokens: int) -> float:
        larger = replace(knobs, prefill_chunk=tokens)
        workspace = plan_workspace(larger, shape=LLAMA, dtype="bfloat16").total_bytes
        buffer = plan_memory(larger, shape=LLAMA, dtype="bfloat16").prefill_buffer_bytes
        beside = memory.weights_bytes + memory.hot_bytes - memory.prefill_buffer_bytes
        return workspace + buffer + beside + HBM_MARGIN_FRAC * machine.hbm_total_bytes

    assert most == chunk or taken(most) <= free
    assert most == 32768 or taken(most + 1) > free


def test_a_gpu_that_is_planned_in_full_has_room_for_larger_chunks() -> None:
    knobs, memory = plan({})
    most = max_prefill_chunk(knobs, memory, shape=LLAMA, machine=H100, dtype="bfloat16")
    assert most > 4 * knobs.prefill_chunk


def test_dense_has_no_summaries_and_more_room_for_pages() -> None:
    _, dense = plan({"sparse_method": "dense"})
    _, sparse = plan({"sparse_method": "quest"})
    assert dense.summaries_bytes == 0
    frame_bytes = sparse.dram_pool_bytes // sparse.num_frames
    assert sparse.summaries_bytes == (sparse.num_frames + 1) * frame_bytes // 8
    assert dense.num_blocks > sparse.num_blocks


def test_a_small_hot_tier_bounds_the_frames_by_their_summaries() -> None:
    asked = {"kv_hbm_gib": 2.0, "kv_dram_gib": 100.0, "page_size": 8}
    _, memory = plan(asked | {"sparse_method": "quest"})
    assert 0.9 * GIB < memory.summaries_bytes <= GIB
    _, small = plan(asked | {"sparse_method": "mean-key"})
    assert small.dram_pool_bytes > 99 * GIB, "an eleventh of the bytes"
    assert small.summaries_bytes < memory.summaries_bytes


def test_a_small_hot_tier_bounds_the_frames_by_their_tables() -> None:
    """Without summaries, too: four bytes for each page of 2 KiB."""
    tiny = replace(LLAMA, head_dim=64, num_parameters=10**9)
    asked = {"kv_hbm_gib": 0.1, "kv_dram_gib": 90.0, "page_size": 8, "sparse_method": "dense"}
    knobs, memory = plan(asked | {"max_num_seqs": 1, "max_model_len": 4096}, shape=tiny)
    geometry = Geometry.of(tiny, dtype="bfloat16", page_size=8)
    segments = memory.num_frames * geometry.table_bytes_per_frame
    assert 0.49 * memory.hot_bytes < segments < 0.5 * knobs.kv_hbm_gib * GIB
    assert memory.dram_pool_bytes == segments * 512 < 30 * GIB


def test_tied_weights_are_held_twice_on_a_cpu() -> None:
    tied, untied = (replace(LLAMA, num_parameters=10**9, tied_embeddings=t) for t in (True, False))
    asked = {"max_num_seqs": 64}
    twice, once = (
        plan(asked, shape=shape, machine=LAPTOP, device="cpu")[0] for shape in (tied, untied)
    )
    embedding_gib = LLAMA.vocab_size * LLAMA.hidden_size * 2 / GIB
    gone = once.kv_hbm_gib + once.kv_dram_gib - twice.kv_hbm_gib - twice.kv_dram_gib
    assert gone == pytest.approx(0.8 * embedding_gib)
    on_gpu = [plan(asked, shape=shape)[0] for shape in (tied, untied)]
    assert on_gpu[0] == on_gpu[1]


def test_rows_are_as_many_as_the_length_that_fits_allows() -> None:
    """Tables are sized for the length that the DRAM tier holds, not for the model's."""
    asked = {"kv_hbm_gib": 0.4, "kv_dram_gib": 1.0}
    knobs, memory = plan(asked)
    assert knobs.max_model_len == memory.num_frames * BLOCK_TOKENS < 10_000
    assert knobs.max_num_seqs > 10
    assert memory.tables_bytes < 0.3 * memory.hot_bytes


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_model_len": 131_073}, "beyond the model's 131072 positions"),
        ({"max_model_len": 100_000, "kv_dram_gib": 1.0}, "hold 8192 tokens; raise kv_dram_gib"),
        ({"kv_dram_gib": 0.01}, "is too small: 128 tokens of this model take 0.0156 GiB"),
        ({"kv_hbm_gib": 0.1}, "needs at least"),
        ({"kv_hbm_gib": 0.001}, "needs at least"),
        ({"max_num_seqs": 1024, "kv_hbm_gib": 1.0}, "needs at least"),
        ({"dense_layers": 33}, "beyond the model's 32 layers"),
        ({"max_num_active_seqs": 65}, "above max_num_seqs=64"),
        ({"token_budgets": 512}, "unknown knob"),
        ({"token_budget": 256, "page_size": 128}, "fewer than four pages"),
    ],
)
def test_what_cannot_be_names_the_knob(asked: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        plan(asked)
    assert error.value.field in asked


def test_the_least_that_is_named_is_enough() -> None:
    with pytest.raises(InputError, match="needs at least") as error:
        plan({"kv_hbm_gib": 0.05, "max_num_seqs": 4, "max_model_len": 1024, "kv_dram_gib": 0.2})
    least = float(str(error.value).partition("needs at least ")[2].partition(";")[0])
    enough = {"kv_hbm_gib": least * 1.01}
    plan({"max_num_seqs": 4, "max_model_len": 1024, "kv_dram_gib": 0.2} | enough)


@pytest.mark.parametrize(("machine", "device"), [(LAPTOP, "cpu"), (H100, "cuda:0")])
def test_weights_that_do_not_fit_end_the_start(machine: MachineFacts, device: str) -> None:
    huge = replace(LLAMA, num_parameters=10**12)
    with pytest.raises(StartError, match="take a smaller model or dtype") as error:
        plan({}, shape=huge, machine=machine, device=device)
    assert error.value.code == ExitCode.UNAVAILABLE


def test_a_workspace_that_does_not_fit_is_told_beside_the_weights() -> None:
    small = replace(H100, hbm_free_bytes=16 * GIB)
    asked = {"prefill_chunk": 32768}
    with pytest.raises(
        StartError, match=r"15\.0 GiB .* workspace \d+\.\d GiB.*lower prefill_chunk"
    ):
        plan(asked, shape=LLAMA, machine=small, device="cuda:0")


def test_a_tiny_model_gets_the_least_a_tier_may_have() -> None:
    asked = {"max_num_seqs": 1, "max_model_len": 128}
    knobs, memory = plan(asked, shape=TINY, machine=LAPTOP, device="cpu", dtype="float32")
    assert knobs.kv_dram_gib == 0.001
    assert memory.num_frames == int(0.001 * GIB) // (128 * TINY.kv_bytes_per_token("float32"))


def test_the_shape_knows_whether_its_embeddings_are_tied(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    from sparsed.engine.models.config import load_config

    for tied in (True, False):
        directory = tiny_checkpoint("llama", tie_word_embeddings=tied)
        assert load_config(directory).shape.tied_embeddings is tied


@given(num_engines=st.integers(1, 8), asked=wishes, where=machines)
def test_engines_side_by_side_have_equal_parts_of_the_host(
    num_engines: int, asked: dict[str, KnobValue], where: tuple[str, MachineFacts]
) -> None:
    device, machine = where
    free = {name: asked[name] for name in asked.keys() - {"kv_dram_gib", "kv_hbm_gib"}}
    try:
        knobs = resolve_knobs(
            free,
            shape=TINY,
            machine=machine,
            device=device,
            dtype="bfloat16",
            num_engines=num_engines,
        )
    except InputError as error:
        assert str(error.field) in str(error)
        return
    pinned_bytes = num_engines * plan_memory(knobs, shape=TINY, dtype="bfloat16").dram_pool_bytes
    least_bytes = num_engines * KNOBS_BY_NAME["kv_dram_gib"].minimum * GIB
    assert pinned_bytes <= max(machine.dram_free_bytes, least_bytes)


def test_two_engines_may_not_pin_more_than_there_is() -> None:
    half = H100.dram_total_bytes / GIB / 2
    resolve = partial(resolve_knobs, shape=LLAMA, machine=H100, device="cuda:0", dtype="bfloat16")
    assert resolve({"kv_dram_gib": half}, num_engines=2).kv_dram_gib == half
    asked = {"kv_dram_gib": half + 1}
    assert resolve(asked).kv_dram_gib == half + 1
    with pytest.raises(InputError, match=r"of 2 engines .* or give fewer devices") as error:
        resolve(asked, num_engines=2)
    assert error.value.field == "kv_dram_gib"
