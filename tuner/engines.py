"""The knobs that other engines have too, under their names; which versions those hold for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sparsed.core import InputError, KnobValue, Profile

VLLM_BLOCK_SIZES: Final = (16, 32)
PAGE_SIZES: Final = ("block-size", "page-size", "kv_cache_config.tokens_per_block")
MEMORY_FRACTIONS: Final = (
    "gpu-memory-utilization",
    "mem-fraction-static",
    "kv_cache_config.free_gpu_memory_fraction",
)
LOST: Final = (
    "token_budget",
    "hbm_budget",
    "residency_watermark",
    "copy_programs",
    "retrieval_stride",
)


class Engine(StrEnum):
    VLLM = "vLLM"
    SGLANG = "SGLang"
    TRTLLM = "TensorRT-LLM"


# First and last release, major and minor, whose names were compared with the functions below.
VERSIONS: Final[Mapping[Engine, tuple[tuple[int, int], tuple[int, int]]]] = {
    Engine.VLLM: ((0, 11), (0, 29)),
    Engine.SGLANG: ((0, 5), (0, 5)),
    Engine.TRTLLM: ((1, 3), (1, 3)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Bytes of one GPU. A fraction is never copied between engines, as each takes it of another
    whole; it is made from these. InputError where the parts do not fit the device."""

    device_bytes: int
    weights_bytes: int
    workspace_bytes: int
    kv_bytes: int

    def __post_init__(self) -> None:
        used_bytes = self.weights_bytes + self.workspace_bytes + self.kv_bytes
        if not 0 < used_bytes <= self.device_bytes or self.free_bytes <= 0:
            raise InputError(
                f"weights, workspace and KV take {used_bytes} bytes of a GPU of "
                f"{self.device_bytes}: no fraction of it can be given; lower kv_hbm_gib",
                field="kv_hbm_gib",
            )

    @property
    def free_bytes(self) -> int:
        """Left once weights and workspace are there."""
        return self.device_bytes - self.weights_bytes - self.workspace_bytes

    @property
    def vllm_frac(self) -> float:
        """All use of the device, over the device."""
        used_bytes = self.weights_bytes + self.workspace_bytes + self.kv_bytes
        return used_bytes / self.device_bytes

    @property
    def sglang_frac(self) -> float:
        """Weights and KV, over the device."""
        return (self.weights_bytes + self.kv_bytes) / self.device_bytes

    @property
    def trtllm_frac(self) -> float:
        """KV, over what weights and workspace leave."""
        return self.kv_bytes / self.free_bytes


def check_version(engine: Engine, version: str | None, *, force: bool) -> str:
    """For which versions the names hold, in words. ``version`` None: one of those.

    InputError for a version that was not compared, unless ``force``.
    """
    first, last = VERSIONS[engine]
    low, high = (".".join(map(str, item)) for item in (first, last))
    known = low if low == high else f"{low} to {high}"
    if version is None:
        return f"names of {engine} {known}"
    found = re.match(r"v?(\d+)\.(\d+)(?![0-9])", version)
    if found and first <= (int(found[1]), int(found[2])) <= last:
        return f"for {engine} {_plain(version)}: names of {known}"
    if not force:
        raise InputError(
            f"{engine} {version}: its names were not compared, only those of {known}; force the "
            "export to have these",
            field="engine_version",
        )
    return f"FORCED for {engine} {_plain(version)}: names of {known}, which may be wrong there"


def engine_settings(
    engine: Engine, profile: Profile, *, memory: DeviceMemory | None
) -> dict[str, KnobValue]:
    """What ``engine`` has in common with ``profile``, by its own names; no None."""
    tables: Mapping[Engine, Callable[..., dict[str, KnobValue]]] = {
        Engine.VLLM: vllm_flags,
        Engine.SGLANG: sglang_flags,
        Engine.TRTLLM: trtllm_settings,
    }
    return tables[engine](profile, memory=memory)


def vllm_flags(profile: Profile, *, memory: DeviceMemory | None) -> dict[str, KnobValue]:
    """vLLM's names. Its token limit of a step counts decode tokens too, ours does not. Its
    FlashAttention takes blocks of multiples of 16 tokens, its older versions none above 32 on
    CUDA: other page sizes are left to its default.

    Source: vllm/engine/arg_utils.py at commit 99d7eb5 and vllm/config/cache.py at c1d8642, about
    version 0.11; the documentation of version 0.29 for what has changed since.
    """
    page_size = profile.values.get("page_size")
    return _known(
        {
            "dtype": profile.key.dtype,
            "block-size": page_size if page_size in VLLM_BLOCK_SIZES else None,
            "max-num-seqs": profile.values.get("max_num_active_seqs"),
            "max-num-batched-tokens": _step_tokens(profile),
            "gpu-memory-utilization": round(memory.vllm_frac, 3) if memory else None,
        }
    )


def sglang_flags(profile: Profile, *, memory: DeviceMemory | None) -> dict[str, KnobValue]:
    """SGLang's names. It refuses a chunk that is no multiple of the page.

    Source: python/sglang/srt/server_args.py at commit 001067f (2026).
    """
    page_size, chunk = profile.values.get("page_size"), profile.values.get("prefill_chunk")
    if isinstance(page_size, int) and isinstance(chunk, int):
        chunk = max(chunk // page_size, 1) * page_size
    return _known(
        {
            "dtype": profile.key.dtype,
            "page-size": page_size,
            "max-running-requests": profile.values.get("max_num_active_seqs"),
            "chunked-prefill-size": chunk,
            "mem-fraction-static": round(memory.sglang_frac, 3) if memory else None,
        }
    )


def trtllm_settings(profile: Profile, *, memory: DeviceMemory | None) -> dict[str, KnobValue]:
    """TensorRT-LLM's names, a dot between table and name. Its token limit of a step counts decode
    tokens too, and cuts no prompt unless chunked prefill is on.

    Source: the reference of KvCacheConfig in the documentation of 1.3.0rc27, and that of LlmArgs.
    """
    tokens = _step_tokens(profile)
    return _known(
        {
            "dtype": profile.key.dtype,
            "max_batch_size": profile.values.get("max_num_active_seqs"),
            "max_num_tokens": tokens,
            "enable_chunked_prefill": None if tokens is None else True,
            "kv_cache_config.tokens_per_block": profile.values.get("page_size"),
            "kv_cache_config.free_gpu_memory_fraction": round(memory.trtllm_frac, 3)
            if memory
            else None,
        }
    )


def losses(engine: Engine, profile: Profile, settings: Mapping[str, KnobValue]) -> tuple[str, ...]:
    """Comments for the reader: what has no counterpart, or was left out, and why."""
    notes = [
        "# names change between versions: compare with those of the installed one",
        f"# the gain was measured with sparsed, and says nothing about {engine}",
    ]
    if lost := [name for name in LOST if name in profile.values]:
        notes.append(f"# lost, no counterpart for a densely trained model: {', '.join(lost)}")
    if "page_size" in profile.values and not settings.keys() & set(PAGE_SIZES):
        size = profile.values["page_size"]
        notes.append(f"# page_size {size} is left out: not every version and backend takes it")
    if not settings.keys() & set(MEMORY_FRACTIONS):
        notes.append("# no memory fraction: it is made from bytes of a GPU, which are not known")
    return tuple(notes)


def _step_tokens(profile: Profile) -> KnobValue:
    """Prompt and decode tokens of a step together; the chunk alone where that is all there is."""
    chunk, active = (profile.values.get(n) for n in ("prefill_chunk", "max_num_active_seqs"))
    if isinstance(chunk, int) and isinstance(active, int):
        return chunk + active
    return chunk


def _known(settings: Mapping[str, KnobValue]) -> dict[str, KnobValue]:
    return {name: value for name, value in settings.items() if value is not None}


def _plain(text: str) -> str:
    """``text`` without what would end a comment."""
    return "".join(c if c.isprintable() else "?" for c in text)
