"""The mechanisms of the overload benchmark, one mode on top of the other, and the engines they run in."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from sparsed.controller.startup import find_device
from sparsed.core import (
    GIB,
    NO_RECALL,
    CopyPath,
    EngineSpec,
    InputError,
    ModelShape,
    SparseMethod,
    WaitReason,
)
from sparsed.engine.admission import GATES, Claim, Gate, Room, dram_gate
from sparsed.engine.budgets import by_gain, even
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.link_policy import CopyChoice
from sparsed.engine.kvcache.paths import CopyPaths, RowCopy
from sparsed.engine.kvcache.shares import Rule
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner

DTYPES: Final = MappingProxyType({"cpu": "float32", "cuda": "bfloat16"})
STATIC: Final = "static-"  # and a multiple


def resident_gate(running: Sequence[Claim], candidate: Claim, room: Room) -> WaitReason | None:
    """All pages of all requests fit the hot tier, to their last token."""
    pages = sum(claim.curve.total for claim in (*running, candidate))
    return WaitReason.HOT_TIER if pages > room.hot_pages else None


@dataclass(frozen=True, kw_only=True)
class Mode:
    """``gates``: who may join. ``rule``: how the hot tier is divided; ``residency``: each request
    has so many times its selection instead. ``recomputes``: hot memory is given out as tokens
    come, and who does not fit any more starts anew."""

    name: str
    is_sparse: bool
    gates: tuple[Gate, ...]
    plain_copies: bool = False
    looks_ahead: bool = False
    rule: Rule = even
    residency: float | None = None
    recomputes: bool = False

    def hbm_budget(self, token_budget: int) -> int | None:
        """The knob: tokens a lane may hold."""
        return None if self.residency is None else int(self.residency * token_budget)


def _stack() -> tuple[Mode, ...]:
    dense = Mode(name="dense-resident", is_sparse=False, gates=(dram_gate, resident_gate))
    sparse = replace(dense, name="sparse-resident", is_sparse=True)
    offload = replace(sparse, name="offload", gates=(dram_gate,), plain_copies=True)
    fast = replace(offload, name="fast-transfer", plain_copies=False)
    ahead = replace(fast, name="look-ahead", looks_ahead=True)
    gated = replace(ahead, name="working-set", gates=GATES)
    mandatory = replace(gated, name="mandatory-only", residency=1.0)
    buffering = replace(mandatory, name="buffering", residency=None, rule=by_gain)
    return dense, sparse, offload, fast, ahead, gated, mandatory, buffering


STACK: Final = _stack()
RECOMPUTE: Final = replace(STACK[0], name="dense-recompute", gates=(dram_gate,), recomputes=True)
MODES: Final[Mapping[str, Mode]] = MappingProxyType({m.name: m for m in (*STACK, RECOMPUTE)})


def parse_mode(name: str) -> Mode:
    """A mode by its name; ``static-2``: buffering of twice the selection for every request."""
    if name in MODES:
        return MODES[name]
    known = f"known: {', '.join(MODES)}, {STATIC}MULTIPLE with a multiple from 1 up"
    try:
        residency = float(name.removeprefix(STATIC)) if name.startswith(STATIC) else 0.0
    except ValueError:
        residency = 0.0
    if not residency >= 1:
        raise InputError(f"unknown mode {name!r}; {known}", field="modes")
    return replace(MODES["buffering"], name=name, residency=residency)


class PlainCopies:
    """Copies page rows as a program without a kernel of its own would: the host reads which, and
    asks the copy engine for one after the other, neighbours together. In place of
    ``kernels.copy.copy_pages``; on a CPU, whose one way of copying is plain, the same."""

    def __init__(self, pool: DramPool, *, device: torch.device) -> None:
        self._chunk_bytes = pool.chunk_bytes
        self._paths = CopyPaths(device)
        path = CopyPath.COPY_ENGINE if device.type == "cuda" else CopyPath.MEMCPY
        self._choice = CopyChoice(path, 0, 0)

    def __call__(
        self,
        dst_RX: Tensor,
        src_RX: Tensor,
        *,
        dst_rows_M: Tensor,
        src_rows_M: Tensor,
        count: Tensor | None = None,
        programs: int = 0,
        tile_bytes: int = 0,
    ) -> None:
        """``programs`` and ``tile_bytes`` are a kernel's."""
        num_rows = len(src_rows_M)
        if count is not None:
            num_rows = min(num_rows, int(count))
        dst_rows, src_rows = (rows[:num_rows].cpu().numpy() for rows in (dst_rows_M, src_rows_M))
        wanted = src_rows >= 0
        copy = RowCopy(
            dst_RX=dst_RX,
            src_RX=src_RX,
            dst_rows=dst_rows[wanted],
            src_rows=src_rows[wanted],
            host_chunk=self._chunk_bytes // dst_RX[:1].nbytes,
        )
        if wanted.any():
            self._paths.run(copy, self._choice)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all engines of a run have in common. ``tokens``: of the longest request; ``kv_tokens``:
    of all requests together, in whole blocks. Sizes in GiB; None: the engine's default."""

    model: str
    device: str
    shape: ModelShape
    tokens: int
    kv_tokens: int
    max_num_seqs: int
    token_budget: int
    hot_gib: float
    dram_gib: float
    page_size: int | None = None
    prefill_chunk: int | None = None
    trace: str | None = None

    def spec(self, mode: Mode) -> EngineSpec:
        """InputError where it does not fit the machine."""
        device, machine = find_device(self.device)
        dtype, shape = DTYPES[device.partition(":")[0]], self.shape
        needed = self.kv_tokens * shape.kv_bytes_per_token(dtype) / GIB * 1.01
        asked = {
            "sparse_method": (
                SparseMethod.MEAN_KEY if mode.is_sparse else SparseMethod.DENSE
            ).value,
            "token_budget": self.token_budget,
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": self.tokens,
            "kv_hbm_gib": self.hot_gib,
            "kv_dram_gib": min(needed, self.dram_gib),
            "prefill_chunk": self.prefill_chunk,
            "page_size": self.page_size if mode.is_sparse else None,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        knobs = resolve_knobs(given, shape=shape, machine=machine, device=device, dtype=dtype)
        return EngineSpec(
            model=self.model,
            device=device,
            dtype=dtype,
            knobs=knobs,
            plan=plan_memory(knobs, shape=shape, dtype=dtype),
            enforce_eager=mode.plain_copies,  # the host is asked in the middle of a step
            recall_stride=NO_RECALL,
            selection_trace=self.trace if mode.is_sparse else None,
            look_ahead=mode.looks_ahead,
        )


class Runners:
    """The runner of a mode: that of the mode before, turned over, or a new one where that cannot
    be, after the old one is gone. What ``get`` gives is good until it is called again, and must not
    be kept."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._runner: Runner | None = None
        self._made_for: Mode | None = None
        self._looks_ahead = False

    def get(self, mode: Mode) -> tuple[Runner, EngineSpec]:
        """The spec's knobs are those of the mode, and in force."""
        made = self._made_for
        if made is None or (made.is_sparse, made.plain_copies) != (
            mode.is_sparse,
            mode.plain_copies,
        ):
            self._make(mode)
        runner, spec = self._runner, self._spec
        assert runner is not None
        if runner.runs_ahead and self._looks_ahead != mode.looks_ahead:
            runner.look_ahead(mode.looks_ahead)
        self._looks_ahead = mode.looks_ahead
        budget = mode.hbm_budget(spec.knobs.token_budget)
        spec = replace(spec, knobs=replace(spec.knobs, hbm_budget=budget))
        runner.apply(spec.knobs)
        runner.kv.shares.rule = mode.rule
        return runner, spec

    def _make(self, mode: Mode) -> None:
        self._runner = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._spec = self._setting.spec(mode)
        self._runner = runner = Runner(self._spec, on_progress=lambda *_: None)
        if mode.plain_copies:
            device = runner.kv.arena.pages_NX.device
            runner.kv.transfer.copy_rows = PlainCopies(runner.kv.pool, device=device)
        self._made_for, self._looks_ahead = mode, mode.looks_ahead
