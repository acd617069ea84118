"""Sizes of both tiers from the model, the machine and the operator's wishes. Free of torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace

from sparsed.core import (
    BLOCK_TOKENS,
    DTYPE_BYTES,
    GIB,
    KNOB_SPECS,
    KNOBS_BY_NAME,
    ExitCode,
    InputError,
    Knobs,
    KnobValue,
    MachineFacts,
    MemoryPlan,
    ModelShape,
    SparseMethod,
    StartError,
    check_knob_values,
)
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.workspace import plan_workspace, workspace

STAGING_TOKENS = 8192  # of one layer: earlier pages on their way to the attention of a chunk
SLOT_BYTES = 8  # owner and age of a slot
MAX_NUM_SEQS = {"cpu": 16, "cuda": 64}
HBM_USE_FRAC = 0.92  # of what is free after the weights and the workspace
# Of a device's memory. The planner's sum was within 1.1 % of six measured peaks, of one model shape
# on one GPU: another may be further off. The default leaves more than this.
HBM_MARGIN_FRAC = 0.02
DRAM_USE_FRAC = 0.8  # of what is free (after the weights, on a CPU)
CPU_HOT_FRAC = 0.4  # of the memory both tiers share on a CPU
TABLES_FRAC = 0.25  # most of the hot tier that rows may take with their tables
FRAMES_FRAC = 0.5  # most of the hot tier that frames may take with their summaries and tables
PAGE_TOKENS = 8  # fine pages rank best, and few bits hold what is kept of each
DENSE_PAGE_TOKENS = 32  # where nothing is ranked: smaller tables, larger pieces to copy
MIN_LANE_BLOCKS = 2  # an open page and one more, for every lane of one request


def resolve_knobs(
    explicit: Mapping[str, object],
    *,
    shape: ModelShape,
    machine: MachineFacts,
    device: str,
    dtype: str,
    num_engines: int = 1,
) -> Knobs:
    """Complete knobs: what was asked for, else the defaults, else what the machine offers.
    ``num_engines`` run beside each other, each with a device and a DRAM tier of its own.

    Errors: InputError naming the knob that is wrong or asks for more than there is; StartError
    (69) when the weights alone do not fit.
    """
    asked = check_knob_values(explicit)
    values: dict[str, KnobValue] = {spec.name: spec.default for spec in KNOB_SPECS} | asked
    kind = device.partition(":")[0]
    num_seqs = int(asked.get("max_num_seqs") or MAX_NUM_SEQS[kind])
    length = _max_model_len(asked.get("max_model_len"), shape)
    values["page_size"] = asked.get("page_size") or _page_size(values)
    needed = workspace(
        shape,
        dtype=dtype,
        chunk=int(values["prefill_chunk"] or 0),
        num_seqs=num_seqs,
        page_size=int(values["page_size"] or 0),
        max_tokens=length,
        selects=values["sparse_method"] != SparseMethod.DENSE,
    )
    hot_free, dram_free = _free_bytes(
        shape,
        machine,
        kind=kind,
        dtype=dtype,
        workspace=needed.total_bytes,
        num_engines=num_engines,
    )
    wanted = num_seqs * num_frames(length) * BLOCK_TOKENS * shape.kv_bytes_per_token(dtype)
    values["kv_dram_gib"] = asked.get("kv_dram_gib") or _gib(min(dram_free, wanted))
    values["kv_hbm_gib"] = asked.get("kv_hbm_gib") or _gib(min(hot_free, wanted * 1.25 + GIB / 4))
    values["max_model_len"] = length
    values["max_num_seqs"] = num_seqs
    values["max_num_active_seqs"] = asked.get("max_num_active_seqs") or num_seqs
    knobs = Knobs(**values)  # type: ignore[arg-type]  # every value was checked by its KnobSpec
    if knobs.dense_layers > shape.num_layers:
        raise InputError(
            f"dense_layers={knobs.dense_layers} is beyond the model's {shape.num_layers} layers; "
            "lower it",
            field="dense_layers",
        )
    _check_machine(knobs, machine, kind=kind, num_engines=num_engines)
    geometry = Geometry.of(shape, dtype=dtype, page_size=knobs.page_size)
    return _fit_rows(_fit_length(knobs, asked, geometry), asked, geometry)


def plan_memory(knobs: Knobs, *, shape: ModelShape, dtype: str) -> MemoryPlan:
    """Bytes of every part, spare frame included. Pages get what summaries, tables and buffers leave of ``kv_hbm_gib``;
    the DRAM pool never holds more frames than there is room for their summaries and tables.

    Errors: InputError naming kv_hbm_gib or kv_dram_gib when a single request does not fit.
    """
    geometry = Geometry.of(shape, dtype=dtype, page_size=knobs.page_size)
    hot_bytes = int(knobs.kv_hbm_gib * GIB)
    staging_bytes = STAGING_TOKENS * _row_bytes(shape, dtype)
    buffer_bytes = _buffer_bytes(knobs.prefill_chunk, shape=shape, dtype=dtype)
    frames = _num_frames(knobs, geometry)
    tables_bytes = geometry.table_bytes(knobs.max_num_seqs, knobs.max_model_len, pool_frames=frames)
    summaries_bytes = (frames + 1) * geometry.summary_bytes_per_frame(knobs.sparse_method)
    used = staging_bytes + buffer_bytes + tables_bytes + summaries_bytes
    block_bytes = geometry.block_bytes + geometry.pages_per_block * SLOT_BYTES
    num_blocks = (hot_bytes - used) // block_bytes
    least = MIN_LANE_BLOCKS * geometry.num_lanes + 1
    if num_blocks < least:
        raise InputError(
            f"kv_hbm_gib={knobs.kv_hbm_gib:.3g} is too small: this model with max_num_seqs="
            f"{knobs.max_num_seqs} needs at least {(used + least * block_bytes) / GIB:.3g}; raise "
            "it or lower max_num_seqs, max_model_len or prefill_chunk",
            field="kv_hbm_gib",
        )
    return MemoryPlan(
        weights_bytes=shape.weight_bytes(dtype),
        hot_pages_bytes=num_blocks * geometry.block_bytes,
        summaries_bytes=summaries_bytes,
        tables_bytes=tables_bytes + num_blocks * geometry.pages_per_block * SLOT_BYTES,
        staging_bytes=staging_bytes,
        prefill_buffer_bytes=buffer_bytes,
        dram_pool_bytes=frames * geometry.frame_bytes,
        num_blocks=num_blocks,
        num_frames=frames,
    )


def max_prefill_chunk(
    knobs: Knobs, plan: MemoryPlan, *, shape: ModelShape, machine: MachineFacts, dtype: str
) -> int:
    """The largest chunk of prompts that a running GPU engine has room for beside its weights and
    its tiers, in what was free before it started; never less than it was started with."""
    most = int(KNOBS_BY_NAME["prefill_chunk"].maximum or 0)
    margin = HBM_MARGIN_FRAC * machine.hbm_total_bytes
    free = machine.hbm_free_bytes - margin - plan.weights_bytes - plan.hot_bytes

    def needed(chunk: int) -> int:
        larger = replace(knobs, prefill_chunk=chunk)
        buffer = _buffer_bytes(chunk, shape=shape, dtype=dtype) - plan.prefill_buffer_bytes
        return plan_workspace(larger, shape=shape, dtype=dtype).total_bytes + max(0, buffer)

    chunks = range(knobs.prefill_chunk, most + 1)
    return knobs.prefill_chunk + max(0, bisect_right(chunks, free, key=needed) - 1)


def _buffer_bytes(chunk: int, *, shape: ModelShape, dtype: str) -> int:
    """K and V of a chunk in one layer, in whole blocks."""
    return (num_frames(chunk) + 1) * BLOCK_TOKENS * _row_bytes(shape, dtype)


def _row_bytes(shape: ModelShape, dtype: str) -> int:
    """K and V of a token in one layer."""
    return 2 * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES[dtype]


def _num_frames(knobs: Knobs, geometry: Geometry) -> int:
    """Frames the DRAM pool holds, at most as many as the hot tier has summaries and tables for."""
    frames = int(knobs.kv_dram_gib * GIB) // geometry.frame_bytes
    if frames < 1:
        raise InputError(
            f"kv_dram_gib={knobs.kv_dram_gib:.3g} is too small: {BLOCK_TOKENS} tokens of this "
            f"model take {geometry.frame_bytes / GIB:.3g} GiB",
            field="kv_dram_gib",
        )
    hot_bytes = geometry.summary_bytes_per_frame(knobs.sparse_method)
    hot_bytes += geometry.table_bytes_per_frame
    known = int(knobs.kv_hbm_gib * GIB * FRAMES_FRAC) // hot_bytes
    return min(frames, max(1, known))  # no room for one: plan_memory says what there must be


def _free_bytes(
    shape: ModelShape,
    machine: MachineFacts,
    *,
    kind: str,
    dtype: str,
    workspace: int,
    num_engines: int,
) -> tuple[float, float]:
    """Bytes (hot tier, DRAM tier) may take. On a CPU both come from the same memory. Engines
    beside each other have equal parts of the host's."""
    weights = shape.weight_bytes(dtype)
    dram_free_bytes = machine.dram_free_bytes / num_engines
    beside, remedy = "", "take a smaller model or dtype"
    if kind == "cpu":
        if shape.tied_embeddings:  # held twice: plain for the look-up, packed for the logits
            weights += shape.vocab_size * shape.hidden_size * DTYPE_BYTES[dtype]
        free = (dram_free_bytes - weights) * DRAM_USE_FRAC
        hot, dram = free * CPU_HOT_FRAC, free * (1 - CPU_HOT_FRAC)
        where = f"{dram_free_bytes / GIB:.1f} GiB of free memory"
    else:
        hot = (machine.hbm_free_bytes - weights - workspace) * HBM_USE_FRAC
        dram = dram_free_bytes * DRAM_USE_FRAC
        where = f"{machine.hbm_free_bytes / GIB:.1f} GiB of free device memory"
        remedy += ", or lower prefill_chunk, max_num_seqs or max_model_len"
        beside = f" and the workspace {workspace / GIB:.1f} GiB"
    if hot <= 0:
        raise StartError(
            f"the weights take {weights / GIB:.1f} GiB in {dtype}{beside}, more than fits into "
            f"{where}; {remedy}",
            code=ExitCode.UNAVAILABLE,
        )
    return hot, dram


def _check_machine(knobs: Knobs, machine: MachineFacts, *, kind: str, num_engines: int) -> None:
    """Tiers may be larger than what is free now, but not than all there is."""
    dram_gib, dram_total = knobs.kv_dram_gib * num_engines, machine.dram_total_bytes / GIB
    hot_gib, hot_total = knobs.kv_hbm_gib, machine.hbm_total_bytes / GIB
    if kind == "cpu":
        dram_gib += knobs.kv_hbm_gib * num_engines
        hot_gib, hot_total = hot_gib * num_engines, dram_total
    for name, gib, total in (
        ("kv_hbm_gib", hot_gib, hot_total),
        ("kv_dram_gib", dram_gib, dram_total),
    ):
        if gib > total:
            of = f" of {num_engines} engines" if num_engines > 1 else ""
            remedy = "lower it, or give fewer devices" if num_engines > 1 else "lower it"
            raise InputError(
                f"{name}={getattr(knobs, name):.6g} does not fit: the tiers{of} would take "
                f"{gib:.6g} of {total:.1f} GiB of memory; {remedy}",
                field=name,
            )


def _page_size(values: Mapping[str, KnobValue]) -> int:
    return DENSE_PAGE_TOKENS if values["sparse_method"] == SparseMethod.DENSE else PAGE_TOKENS


def _max_model_len(asked: KnobValue, shape: ModelShape) -> int:
    if asked is None:
        return shape.max_position
    if int(asked) > shape.max_position:
        raise InputError(
            f"max_model_len={asked} is beyond the model's {shape.max_position} positions; lower it",
            field="max_model_len",
        )
    return int(asked)


def _fit_length(knobs: Knobs, asked: Mapping[str, KnobValue], geometry: Geometry) -> Knobs:
    """A length the DRAM tier can hold; what was asked for is never changed."""
    most = _num_frames(knobs, geometry) * BLOCK_TOKENS
    if most >= knobs.max_model_len:
        return knobs
    if "max_model_len" in asked:
        raise InputError(
            f"max_model_len={knobs.max_model_len} does not fit: the DRAM tier and its summaries "
            f"hold {most} tokens; raise kv_dram_gib or kv_hbm_gib, or lower max_model_len",
            field="max_model_len",
        )
    return replace(knobs, max_model_len=most)


def _fit_rows(knobs: Knobs, asked: Mapping[str, KnobValue], geometry: Geometry) -> Knobs:
    """Fewer rows where their tables would crowd out pages, unless they were asked for."""
    if "max_num_seqs" in asked or "max_num_active_seqs" in asked:
        return knobs
    room = int(knobs.kv_hbm_gib * GIB * TABLES_FRAC)
    rows = max(1, room // geometry.table_bytes_per_row(knobs.max_model_len))
    rows = min(knobs.max_num_seqs, rows)
    return replace(knobs, max_num_seqs=rows, max_num_active_seqs=rows)


def _gib(num_bytes: float) -> float:
    """A tier's size as a knob; the least the knob allows where a tiny model needs less."""
    return max(num_bytes / GIB, KNOBS_BY_NAME["kv_dram_gib"].minimum or 0.0)
