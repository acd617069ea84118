"""The tensors of a GGUF file: their Hugging Face names, dequantised, written as safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sparsed.core import InputError

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TABLES = ("rope_freqs.weight",)  # not weights: they go into config.json


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTensor:
    """One tensor as it lies in the file; ``shape`` has the slowest dimension first."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    data: np.ndarray

    @classmethod
    def of(cls, tensor: Any) -> SourceTensor:
        """From what the gguf package's reader lists."""
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return cls(
            name=tensor.name,
            shape=shape,
            kind=tensor.tensor_type,
            data=tensor.data,
        )

    @property
    def num_bytes(self) -> int:
        """Size in float32."""
        return 4 * math.prod(self.shape)

    def dequantize(self) -> np.ndarray:
        """The values in float32; InputError for a type that cannot be read."""
        from gguf.quants import dequantize

        try:
            values: np.ndarray = dequantize(self.data, self.kind)
        except NotImplementedError:
            raise InputError(
                f"tensor {self.name} is of type {self.kind.name}, which cannot be read; "
                "use F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K",
                field="model",
            ) from None
        return values.reshape(self.shape).astype(np.float32, copy=False)


def find_tensor(tensors: Iterable[SourceTensor], name: str) -> SourceTensor | None:
    """The tensor of that name, or None."""
    return next((tensor for tensor in tensors if tensor.name == name), None)


def write_tensors(
    tensors: Iterable[SourceTensor],
    directory: Path,
    *,
    permuted_heads: Mapping[str, int],
    max_shard_bytes: int,
    progress: Callable[[float], None],
) -> None:
    """Write ``model.safetensors``, or shards with their index, holding one shard in memory.

    ``permuted_heads`` maps a projection to its heads where rows must be put back in order.
    """
    shards = _shards([tensor for tensor in tensors if tensor.name not in _TABLES], max_shard_bytes)
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        values = {}
        for tensor in shard:
            name, part = hugging_face_name(tensor.name), tensor.name.split(".")[-2]
            values[name] = tensor.dequantize()
            if part in permuted_heads:
                values[name] = _in_halves(values[name], heads=permuted_heads[part])
            done += tensor.num_bytes
            progress(done / total)
        file_name = f"model{suffix}.safetensors"
        save_file(values, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; InputError if new."""
    match name.split("."):
        case [part, suffix] if part in _NAMES:
            return f"{_NAMES[part]}.{suffix}"
        case ["blk", layer, part, suffix] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"
    raise InputError(f"unknown tensor {name}; the model is of an unknown kind", field="model")


def _in_halves(values: np.ndarray, *, heads: int) -> np.ndarray:
    """Rows of each head from interleaved pairs (2i, 2i + 1) to halves (i, i + D/2)."""
    if len(values) % (2 * heads):
        raise InputError(f"{len(values)} rows do not divide into {heads} heads", field="model")
    pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _shards(tensors: list[SourceTensor], max_bytes: int) -> list[list[SourceTensor]]:
    """Consecutive tensors in groups of at most ``max_bytes``, or of one."""
    shards: list[list[SourceTensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards
