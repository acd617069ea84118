"""Real engine parts of small sizes: caches without a model, runners and engines with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsed.core import GIB, EngineSpec, MachineFacts, ModelShape, Service, SparseMethod
from sparsed.engine.batch import PromptChunk, StepPlan
from sparsed.engine.engine import Engine
from sparsed.engine.in_place_costs import OverheadMeter
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.hbm import HotArena
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer
from sparsed.engine.models.config import load_config
from sparsed.engine.models.dummy import DUMMY_PREFIX, dummy_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.recorder import Recorder
from sparsed.engine.runner import Runner
from sparsed.engine.sparse.basis import Basis
from sparsed.engine.sparse.selectors import make_selector
from sparsed.engine.step_decoder import StepDecoder
from sparsed.engine.step_graphs import GraphTarget
from sparsed.engine.tiered import TieredAttention

MakeBasis = Callable[[Geometry], Basis]
MakeCache = Callable[..., KVCache]
MakeSpec = Callable[..., EngineSpec]
MakeRunner = Callable[..., Runner]
MakeEngine = Callable[..., Engine]
MakeSteps = Callable[..., StepDecoder]
Prefill = Callable[..., int]

SHAPE = ModelShape(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_size=16,
    intermediate_size=16,
    vocab_size=64,
    max_position=8192,
    num_parameters=1,
)
MACHINE = MachineFacts(
    cpu_name="test", num_cpus=2, dram_total_bytes=8 * GIB, dram_free_bytes=4 * GIB
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # results of small products do not depend on the machine then


@pytest.fixture(scope="session")
def make_basis() -> MakeBasis:
    """``make_basis(geometry)`` -> of every lane a random rotation, cut to the kept dims, and a
    random centre: always the same ones."""

    def make(geometry: Geometry) -> Basis:
        random = torch.Generator().manual_seed(0)
        lanes, dims = (geometry.num_layers, geometry.num_kv_heads), geometry.head_dim
        rotations = torch.linalg.qr(torch.randn((*lanes, dims, dims), generator=random)).Q
        keys = rotations[..., : geometry.kept_dims].contiguous()
        return Basis(keys, keys, torch.randn((*lanes, dims), generator=random))

    return make


@pytest.fixture(scope="session")
def make_cache(make_basis: MakeBasis) -> MakeCache:
    """``make_cache(lane_blocks=, num_frames=, page_size=, **knobs)`` -> a cache of two layers and
    two KV heads whose arena has that many blocks per lane, and two more that fill no lane."""

    def make(
        *, lane_blocks: int, num_frames: int, page_size: int = 32, shape: ModelShape = SHAPE,
        **values: Any,
    ) -> KVCache:  # fmt: skip
        asked = {"page_size": page_size, "max_num_seqs": 4, "max_model_len": 1024, **values}
        knobs = resolve_knobs(asked, shape=shape, machine=MACHINE, device="cpu", dtype="float32")
        plan = replace(
            plan_memory(knobs, shape=shape, dtype="float32"),
            num_blocks=1 + lane_blocks * shape.num_lanes + 2,
            num_frames=num_frames,
        )
        geometry = Geometry.of(shape, dtype="float32", page_size=page_size)
        parts: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
        tables = PageTables(
            geometry,
            num_rows=knobs.max_num_seqs,
            max_model_len=knobs.max_model_len,
            pool_frames=num_frames,
            device=parts["device"],
        )
        return KVCache(
            geometry,
            arena=HotArena(geometry, plan, **parts),
            pool=DramPool(geometry, num_frames=num_frames, pool_fd=None, **parts),
            tables=tables,
            selector=make_selector(
                knobs.sparse_method,
                geometry=geometry,
                frames_RF=tables.frames_RF,
                num_frames=num_frames,
                dtype=parts["dtype"],
                basis=make_basis(geometry),
            ),
            transfer=Transfer(page_bytes=geometry.page_bytes, device=parts["device"]),
            knobs=knobs,
        )

    return make


@pytest.fixture(scope="session")
def prefill() -> Prefill:
    """``prefill(runner, tokens, method=MEAN_KEY, token_budget=None, output=64)`` -> the KV row of a
    request whose prompt, ``tokens``, ran as one chunk; there is room for ``output`` more."""

    def run(
        runner: Runner,
        tokens: Sequence[int],
        *,
        method: SparseMethod = SparseMethod.MEAN_KEY,
        token_budget: int | None = None,
        output: int = 64,
    ) -> int:
        length = len(tokens)
        row = runner.kv.add(length + output, method=method, token_budget=token_budget)
        chunk = PromptChunk(
            row=row,
            tokens=tuple(tokens),
            start=0,
            prompt_length=length,
            logits_from=length - 1,
        )
        runner.run(StepPlan(chunks=(chunk,), decodes=()))
        return row

    return run


@pytest.fixture(scope="session")
def make_spec() -> MakeSpec:
    """``make_spec(model, lane_blocks=None, num_frames=None, **knobs)`` -> the spec of a float32
    CPU engine of a directory or ``dummy:<shape>``. ``lane_blocks`` shrinks the arena to so many
    blocks a lane, ``num_frames`` the DRAM tier."""

    def make(
        model: str | Path = "dummy:tiny",
        *,
        lane_blocks: int | None = None,
        num_frames: int | None = None,
        **values: Any,
    ) -> EngineSpec:
        dummy = str(model).startswith(DUMMY_PREFIX)
        config = dummy_config(str(model)) if dummy else load_config(Path(model))
        shape = config.shape
        asked = {
            "max_num_seqs": 8,
            "max_model_len": min(4096, shape.max_position),
            "kv_hbm_gib": 0.1,
            "kv_dram_gib": 0.1,
            **values,
        }
        knobs = resolve_knobs(asked, shape=shape, machine=MACHINE, device="cpu", dtype="float32")
        plan = plan_memory(knobs, shape=shape, dtype="float32")
        plan = replace(plan, num_frames=num_frames or plan.num_frames)
        if lane_blocks is not None:
            plan = replace(plan, num_blocks=1 + lane_blocks * shape.num_lanes)
        return EngineSpec(model=str(model), device="cpu", dtype="float32", knobs=knobs, plan=plan)

    return make


@pytest.fixture(scope="session")
def make_runner(make_spec: MakeSpec) -> MakeRunner:
    """A runner from the arguments of ``make_spec``."""

    def make(*arguments: Any, **values: Any) -> Runner:
        return Runner(make_spec(*arguments, **values), on_progress=lambda *_: None)

    return make


@pytest.fixture(scope="session")
def make_engine(make_spec: MakeSpec) -> MakeEngine:
    """An engine from the arguments of ``make_spec``, without a quality breaker: models of random
    weights have no quality, and what they say would depend on which steps are sampled."""

    def make(*arguments: Any, **values: Any) -> Engine:
        spec = make_spec(*arguments, **values)
        runner = Runner(spec, on_progress=lambda *_: None)
        return Engine(runner, knobs=spec.knobs, service=Service(recall_floor=0.0))

    return make


@pytest.fixture(scope="session")
def make_steps() -> MakeSteps:
    """``make_steps(runner, looks_ahead=False, meter=None, recorder=None)`` -> queued steps of its
    cache; without a recorder there are no graphs."""

    def make(
        runner: Runner,
        *,
        looks_ahead: bool = False,
        meter: OverheadMeter | None = None,
        recorder: Recorder | None = None,
    ) -> StepDecoder:
        kv, config = runner.kv, runner.decoder.config
        scale = config.head_dim**-0.5
        assert kv.selector is not None
        tiered = TieredAttention(
            kv,
            kv.selector,
            max_rows=8,
            max_count=64,
            max_pages=kv.geometry.max_pages(4096),
            scale=scale,
            trace=runner.attention.tiers.trace,
            looks_ahead=looks_ahead,
        )
        return StepDecoder(
            runner.decoder,
            kv,
            tiered=tiered,
            fetch_times=runner.fetch_times,
            last_token_R=torch.zeros(kv.tables.spare_row + 1, dtype=torch.int64),
            max_rows=8,
            max_tokens=4096,
            scale=scale,
            recorder=recorder,
            target=GraphTarget((64,), kv.transfer.ways.load, kv.kept.is_on),
            meter=meter,
        )

    return make
