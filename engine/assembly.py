"""The parts of a runner, made from its spec."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sparsed.core import EngineSpec, Knobs, LinkCalibration, LinkProbe, SparseMethod
from sparsed.engine.attention import Attention
from sparsed.engine.calibrate import ensure_calibration
from sparsed.engine.fetch_times import FetchTimes
from sparsed.engine.in_place_costs import OverheadMeter
from sparsed.engine.kvcache.cache import KVCache
from sparsed.engine.kvcache.dram import DramPool
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.kvcache.hbm import HotArena
from sparsed.engine.kvcache.tables import PageTables
from sparsed.engine.kvcache.transfer import Transfer, probe_link
from sparsed.engine.kvcache.verify import Verifier
from sparsed.engine.measure.ceilings import give_back_memory
from sparsed.engine.models.config import load_config
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.models.dummy import DUMMY_PREFIX, dummy_config
from sparsed.engine.models.weights import load_weights, random_weights
from sparsed.engine.recorder import CudaRecorder
from sparsed.engine.sparse.learned import find_basis
from sparsed.engine.sparse.replay import SelectionTrace, load_trace
from sparsed.engine.sparse.selectors import make_selector
from sparsed.engine.step_decoder import StepDecoder
from sparsed.engine.step_graphs import GraphTarget, ladder, most_pages
from sparsed.engine.tiered import TieredAttention

Progress = Callable[[str, float], None]


def load_decoder(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    on_progress: Progress,
) -> Decoder:
    """The model of a directory or a dummy name. InputError for files that are wrong."""
    progress = partial(on_progress, "loading weights")
    if model.startswith(DUMMY_PREFIX):
        config = dummy_config(model)
        weights = random_weights(config, device=device, dtype=dtype, seed=seed, progress=progress)
        return Decoder(config, weights)
    directory = Path(model)
    config = load_config(directory)
    weights = load_weights(directory, config=config, device=device, dtype=dtype, progress=progress)
    return Decoder(config, weights)


def make_cache(
    spec: EngineSpec, decoder: Decoder, *, pool_fd: int | None, on_progress: Progress
) -> KVCache:
    """Both tiers and their tables, as planned, and what ranks pages. StartError where memory is
    short."""
    knobs, plan, device, dtype = spec.knobs, spec.plan, torch.device(spec.device), dtype_of(spec)
    geometry = Geometry.of(decoder.config.shape, dtype=spec.dtype, page_size=knobs.page_size)
    basis = None
    if knobs.sparse_method == SparseMethod.MEAN_KEY:
        learning = partial(on_progress, "learning the basis of keys")
        basis = find_basis(spec, decoder, geometry=geometry, on_progress=learning)
    on_progress("allocating both KV tiers", 0.0)
    give_back_memory(device)  # what loading and learning took on the way
    tables = PageTables(
        geometry,
        num_rows=knobs.max_num_seqs,
        max_model_len=knobs.max_model_len,
        pool_frames=plan.num_frames,
        device=device,
    )
    num_page_rows = plan.num_frames * geometry.page_rows_per_frame
    return KVCache(
        geometry,
        arena=HotArena(geometry, plan, dtype=dtype, device=device),
        pool=DramPool(
            geometry,
            num_frames=plan.num_frames,
            dtype=dtype,
            device=device,
            pool_fd=pool_fd,
            on_progress=partial(on_progress, "pinning memory"),
        ),
        tables=tables,
        selector=make_selector(
            knobs.sparse_method,
            geometry=geometry,
            frames_RF=tables.frames_RF,
            num_frames=plan.num_frames,
            dtype=dtype,
            basis=basis,
        ),
        transfer=Transfer(
            page_bytes=geometry.page_bytes,
            device=device,
            verifier=Verifier(spec.verify_kv, num_page_rows=num_page_rows, device=device),
        ),
        knobs=knobs,
    )


def make_trace(spec: EngineSpec, kv: KVCache) -> SelectionTrace | None:
    """The selections to be replayed in place of the model's own."""
    if spec.selection_trace is None:
        return None
    return load_trace(
        Path(spec.selection_trace),
        page_size=kv.geometry.page_size,
        token_budget=spec.knobs.token_budget,
        num_layers=kv.geometry.num_layers,
        num_heads=kv.geometry.num_kv_heads,
        device=kv.arena.pages_NX.device,
    )


def make_attention(spec: EngineSpec, kv: KVCache, *, trace: SelectionTrace | None) -> Attention:
    """The attention of a cache, with the staging area that was planned."""
    num_staged = spec.plan.staging_bytes // kv.geometry.page_bytes
    return Attention(
        kv,
        staging_NX=kv.arena.pages_NX.new_empty((num_staged, kv.arena.pages_NX.shape[1])),
        dense_layers=spec.knobs.dense_layers,
        scale=kv.geometry.head_dim**-0.5,
        recall_stride=spec.recall_stride,
        trace=trace,
    )


def make_steps(
    spec: EngineSpec,
    decoder: Decoder,
    kv: KVCache,
    *,
    fetch_times: FetchTimes,
    last_token_R: Tensor,
    trace: SelectionTrace | None,
    meter: OverheadMeter | None,
) -> StepDecoder:
    """Queued steps of a cache whose ways of copying are known, nothing of them recorded yet."""
    knobs, page_size, scale = spec.knobs, kv.geometry.page_size, decoder.config.head_dim**-0.5
    target, tiered = graph_target(kv, knobs), None
    if target.counts:
        assert kv.selector is not None
        tiered = TieredAttention(
            kv,
            kv.selector,
            max_rows=knobs.max_num_seqs,
            max_count=most_pages(page_size=page_size, max_tokens=knobs.max_model_len),
            max_pages=kv.geometry.max_pages(knobs.max_model_len),
            scale=scale,
            trace=trace,
            looks_ahead=spec.look_ahead,
        )
    return StepDecoder(
        decoder,
        kv,
        tiered=tiered,
        fetch_times=fetch_times,
        last_token_R=last_token_R,
        max_rows=knobs.max_num_seqs,
        max_tokens=knobs.max_model_len,
        scale=scale,
        recorder=None if spec.enforce_eager else CudaRecorder(last_token_R.device),
        target=target,
        meter=meter,
    )


def graph_target(kv: KVCache, knobs: Knobs) -> GraphTarget:
    """What there are to be graphs of under these knobs, as pages are loaded now. Queued steps do
    not select where layers differ in that."""
    counts: tuple[int, ...] = ()
    if kv.selector is not None and knobs.dense_layers == 0:
        page_size, max_tokens = kv.geometry.page_size, knobs.max_model_len
        counts = ladder(knobs.token_budget, page_size=page_size, max_tokens=max_tokens)
    keeps = bool(counts) and (kv.kept.is_on or knobs.retrieval_stride > 1)
    return GraphTarget(counts, kv.transfer.ways.load, keeps)


def measure_link(
    spec: EngineSpec, kv: KVCache, *, on_progress: Progress
) -> tuple[LinkProbe, LinkCalibration | None]:
    """The link's speed, and the calibration made for it if the spec brought none that fits."""
    pool, hot_NX, ways = kv.pool, kv.arena.pages_NX, kv.transfer.ways
    report = partial(on_progress, "measuring the link")
    report(0.0)
    calibration = ensure_calibration(spec, pool=pool, hot_NX=hot_NX, on_progress=report)
    if calibration is not None:
        ways.calibrate(calibration)
    ways.set_programs(spec.knobs.copy_programs)
    kv.transfer.warm_up(pool.pages_RX, hot_NX)
    link = probe_link(pool.pages_RX, hot_NX, ways=ways)
    return link, None if calibration is spec.calibration else calibration


def dtype_of(spec: EngineSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def library_versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),  # TorchVersion, a str that no encoder knows
        "triton": version("triton"),
        "cuda": torch.version.cuda or "none",
    }
