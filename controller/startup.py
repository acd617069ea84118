"""From what was asked to what an engine is started with: model, machine, profile, knobs, bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource
from sparsed.controller.links import link_key
from sparsed.controller.lookups import (
    FindCalibration,
    FindProfiles,
    FindTuned,
    FindVerified,
    calibrations_of,
    finders_of,
)
from sparsed.controller.selection_trace import find_selection_trace
from sparsed.controller.start_values import (
    Sized,
    find_sources,
    find_values,
    site_here,
    warn_of_mismatch,
)
from sparsed.controller.tokenizer import Tokenizer
from sparsed.core import (
    GIB,
    QUEUED_RECALL_STRIDE,
    RECALL_STRIDE,
    WATCHED_RECALL_STRIDE,
    EngineSpec,
    InputError,
    KnobValue,
    MachineFacts,
    MemoryPlan,
    ModelShape,
    ProfileKey,
    Service,
    Slo,
    SparseMethod,
    UnprovedProfile,
    VerifyMode,
)
from sparsed.engine.admission import mandatory_blocks
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.models.catalog import ResolvedModel, resolve_model
from sparsed.engine.models.config import ModelConfig, load_config
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import max_prefill_chunk, plan_memory, resolve_knobs
from sparsed.profiler.machine import read_machine

FIT_EXAMPLES_TOKENS = (8_192, 32_768, 131_072)

Progress = Callable[[str, float], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartPlan:
    """Everything a start needs, decided; ``spec`` is what the engine gets."""

    spec: EngineSpec
    model: ModelConfig
    model_id: str
    tokenizer_dir: Path | None  # None: a dummy model, which has no tokenizer of its own
    machine: MachineFacts
    key: ProfileKey
    profile: str  # which profile was taken and why, or why none
    sources: Mapping[str, KnobSource]  # of every knob
    versions: Mapping[str, str]  # of what it runs on
    stale: str = ""  # what was measured on another platform and left out, in words
    profile_id: int | None = None  # of the profile that was taken, if it is in the store
    stale_profile_id: int | None = None
    unproved: UnprovedProfile | None = None  # for the live tuner to try first

    @property
    def gpu_plan(self) -> MemoryPlan | None:
        """What is planned for the memory of a GPU; None on a CPU."""
        return None if self.spec.device == "cpu" else self.spec.plan

    @property
    def max_prefill_chunk(self) -> int | None:
        """The largest chunk of prompts that memory has room for until a restart; None on a CPU,
        whose workspace is not planned."""
        if self.spec.device == "cpu":
            return None
        spec, shape = self.spec, self.model.shape
        return max_prefill_chunk(
            spec.knobs, spec.plan, shape=shape, machine=self.machine, dtype=spec.dtype
        )


def prepare(
    config: DaemonConfig,
    *,
    progress: Progress,
    find_verified: FindVerified | None = None,
    find_calibration: FindCalibration | None = None,
    find_tuned: FindTuned | None = None,
    find_profiles: FindProfiles | None = None,
    num_engines: int = 1,
) -> StartPlan:
    """Resolve model, device, profile, knobs and memory. Reads files, may fetch a model: blocks.

    ``find_...`` None: profiles, calibrations and what the live tuner left are read from the
    database of the state directory, if any. ``num_engines`` are going to share the memory of the
    host, this one among them.
    Errors: InputError naming the field that is wrong or does not fit.
    """
    finders = finders_of(
        config.state_dir, verified=find_verified, profiles=find_profiles, tuned=find_tuned
    )
    resolved, model = find_model(config, progress=progress)
    device, machine = find_device(config.device)
    link = None if device == "cpu" else link_key(machine)
    find_calibration = find_calibration or calibrations_of(config.state_dir)
    dtype = choose_dtype(config.dtype, device=device, model=model)
    key = ProfileKey(hardware=machine.fingerprint, model=resolved.model_id, dtype=dtype)
    warn_of_mismatch(config, key)
    size = _sizer(model.shape, machine, device=device, dtype=dtype, num_engines=num_engines)
    here = site_here(key, model.shape, machine)
    sized, chosen = find_values(size, config, here, finders=finders)
    return StartPlan(
        spec=EngineSpec(
            model=f"dummy:{resolved.dummy}" if resolved.dummy else str(resolved.path),
            device=device,
            dtype=dtype,
            knobs=sized.knobs,
            plan=sized.plan,
            seed=config.seed,
            enforce_eager=config.enforce_eager,
            always_select=config.always_select,
            recall_stride=_recall_stride(device, slo=config.slo),
            verify_kv=VerifyMode(config.verify_kv),
            selection_trace=find_selection_trace(config.selection_trace, knobs=sized.knobs),
            service=Service(tpot_s=config.slo.tpot_s, recall_floor=config.recall_floor),
            link=link,
            calibration=find_calibration(link) if link else None,
            cache_dir=str(config.cache_dir),
            hbm_free_bytes=0 if device == "cpu" else machine.hbm_free_bytes,
        ),
        model=model,
        model_id=resolved.model_id,
        tokenizer_dir=resolved.path,
        machine=machine,
        key=key,
        profile=chosen.why,
        sources=find_sources(config, chosen=chosen),
        versions=here.versions,
        stale=chosen.stale,
        profile_id=chosen.profile.profile_id if chosen.profile else None,
        stale_profile_id=chosen.stale_profile_id,
        unproved=chosen.unproved,
    )


def _recall_stride(device: str, *, slo: Slo) -> int:
    if device == "cpu":
        return RECALL_STRIDE
    return QUEUED_RECALL_STRIDE if slo.min_recall is None else WATCHED_RECALL_STRIDE


def check_next_start(plan: StartPlan, values: Mapping[str, KnobValue]) -> None:
    """InputError naming the knob if a start like ``plan``, but with ``values``, would fail."""
    spec = plan.spec
    sized = _size(
        values,
        shape=plan.model.shape,
        machine=plan.machine,
        device=spec.device,
        dtype=spec.dtype,
    )
    trace = Path(spec.selection_trace) if spec.selection_trace else None
    find_selection_trace(trace, knobs=sized.knobs)


def _sizer(
    shape: ModelShape, machine: MachineFacts, *, device: str, dtype: str, num_engines: int
) -> Callable[[Mapping[str, KnobValue]], Sized]:
    return partial(
        _size, shape=shape, machine=machine, device=device, dtype=dtype, num_engines=num_engines
    )


def _size(
    values: Mapping[str, KnobValue],
    *,
    shape: ModelShape,
    machine: MachineFacts,
    device: str,
    dtype: str,
    num_engines: int = 1,
) -> Sized:
    knobs = resolve_knobs(
        values,
        shape=shape,
        machine=machine,
        device=device,
        dtype=dtype,
        num_engines=num_engines,
    )
    return Sized(knobs=knobs, plan=plan_memory(knobs, shape=shape, dtype=dtype))


def load_tokenizer(plan: StartPlan) -> Tokenizer:
    """The model's tokenizer, or one of bytes for a dummy. InputError naming a broken file."""
    if plan.tokenizer_dir is None:
        return Tokenizer.of_bytes(vocab_size=plan.model.vocab_size)
    return Tokenizer.load(plan.tokenizer_dir)


def describe_plan(plan: StartPlan) -> str:
    """The text of `sparsed start --dry-run`: bytes per tier and part, and what fits."""
    spec, memory = plan.spec, plan.spec.plan
    parts = (
        ("weights", memory.weights_bytes),
        ("hot tier", memory.hot_bytes),
        ("  pages", memory.hot_pages_bytes),
        ("  summaries", memory.summaries_bytes),
        ("  page tables", memory.tables_bytes),
        ("  staging", memory.staging_bytes),
        ("  prefill buffers", memory.prefill_buffer_bytes),
        ("DRAM tier", memory.dram_pool_bytes),
    )
    knobs = spec.knobs.as_dict()
    return "\n".join(
        (
            f"model    {plan.model_id} ({plan.model.shape.num_parameters / 1e6:,.0f} M parameters)",
            f"device   {spec.device}, {spec.dtype}, {plan.machine.fingerprint}",
            f"profile  {plan.profile}",
            *([f"selections replayed from {spec.selection_trace}"] if spec.selection_trace else []),
            "memory",
            *(f"  {name:<20}{num_bytes / GIB:>10.3f} GiB" for name, num_bytes in parts),
            "knobs",
            *(
                f"  {name:<20}{_short(value):>12}  ({plan.sources[name]})"
                for name, value in knobs.items()
            ),
            "requests that fit at once",
            *(
                f"  {tokens:>9,} tokens  {_fit_in_words(plan, tokens)}"
                for tokens in FIT_EXAMPLES_TOKENS
            ),
        )
    )


def num_fitting(plan: StartPlan, num_tokens: int) -> int:
    """How many requests of ``num_tokens`` (prompt and output) both tiers hold at once.

    In the hot tier each needs what the KV cache admits it with: its selection and the block it
    writes, where attention is dense all of its own blocks; never more than the tier has for one
    request alone.
    """
    knobs, memory = plan.spec.knobs, plan.spec.plan
    if num_tokens > knobs.max_model_len:
        return 0
    frames = num_frames(num_tokens)
    lane_blocks = (memory.num_blocks - 1) // plan.model.shape.num_lanes  # one is nobody's
    mandatory = mandatory_blocks(
        num_tokens,
        method=SparseMethod(knobs.sparse_method),
        token_budget=knobs.token_budget,
        lane_blocks=lane_blocks,
    )
    return min(memory.num_frames // frames, lane_blocks // mandatory, knobs.max_num_seqs)


def _short(value: KnobValue) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "auto" if value is None else str(value)


def _fit_in_words(plan: StartPlan, num_tokens: int) -> str:
    if num_tokens > plan.spec.knobs.max_model_len:
        return f"none: max_model_len is {plan.spec.knobs.max_model_len}"
    return str(num_fitting(plan, num_tokens))


def find_model(config: DaemonConfig, *, progress: Progress) -> tuple[ResolvedModel, ModelConfig]:
    """The model on this machine, fetched if need be, and its sizes. InputError saying what to do."""
    resolved = resolve_model(config.model, cache_dir=config.cache_dir, progress=progress)
    if resolved.dummy is not None:
        return resolved, dummy_config(resolved.dummy)
    assert resolved.path is not None
    return resolved, load_config(resolved.path)


def find_device(asked: str) -> tuple[str, MachineFacts]:
    """The device that ``asked`` (auto, cpu, cuda, cuda:N) means here, and the machine's facts.

    Errors: InputError if it is not there.
    """
    machine = _machine(asked)
    return _device(asked, machine), machine


def _machine(device: str) -> MachineFacts:
    """Facts of the machine, without its GPU where that is not to be used."""
    index = int(device.partition(":")[2] or 0)
    machine = read_machine(gpu_index=index)
    if device != "cpu":
        return machine
    return replace(machine, gpu_name=None, gpu_uuid=None, hbm_total_bytes=0, hbm_free_bytes=0)


def _device(device: str, machine: MachineFacts) -> str:
    if device == "cpu" or (device == "auto" and not machine.num_gpus):
        return "cpu"
    index = int(device.partition(":")[2] or 0)
    if index >= machine.num_gpus:
        raise InputError(
            f"--device {device}: this machine has {machine.num_gpus} GPUs that its driver knows; "
            "give one of them, or cpu",
            field="device",
        )
    return f"cuda:{index}"


def choose_dtype(dtype: str, *, device: str, model: ModelConfig) -> str:
    """What ``auto`` means: on a CPU float32 is the fast and exact one; on a GPU float32 weights run as bfloat16."""
    if dtype != "auto":
        return dtype
    if device == "cpu":
        return "float32"
    return "bfloat16" if model.dtype == "float32" else model.dtype
