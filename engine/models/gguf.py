"""A GGUF file turned into a Hugging Face directory, once. Free of torch.

The ``gguf`` package is imported where it is used: hosts that serve Hugging Face directories alone
may lack it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsed.core import ExitCode, InputError
from sparsed.engine.models.config import parse_config
from sparsed.engine.models.fields import Fields
from sparsed.engine.models.gguf_tensors import SourceTensor, find_tensor, write_tensors
from sparsed.engine.models.gguf_tokenizer import write_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral files say llama
MAX_SHARD_BYTES = 4 * 10**9
_LLAMA3_ORIGINAL_CONTEXT = 8192  # tokens; no file says so, it is a constant of the format


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """Metadata by key, with numpy scalars turned into Python's, and tensors still mapped."""

    metadata: Mapping[str, Any]
    tensors: tuple[SourceTensor, ...]

    def whole(self, key: str, *, default: int | None = None, minimum: int = 1) -> int:
        """``{architecture}.{key}`` as a whole number; InputError naming it if absent or wrong."""
        name = f"{self.architecture}.{key}"
        return Fields(self.metadata).whole(name, default=default, minimum=minimum)

    def number(self, key: str, *, default: float | None = None) -> float:
        """``{architecture}.{key}`` as a number; InputError naming it if absent or wrong."""
        return Fields(self.metadata).number(f"{self.architecture}.{key}", default=default)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))


def convert_gguf(
    source: Path,
    directory: Path,
    *,
    progress: Callable[[float], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config, generation config, tokenizer and float32 weights into ``directory``.

    Errors: InputError naming the file if it is damaged, or of an unknown architecture, tensor
    type or tokenizer.
    """
    try:
        file = _read_gguf(source)
        config = hugging_face_config(file)
        parse_config(config)
        _write_json(directory / "config.json", config)
        token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(directory / "generation_config.json", token_ids)
        write_tokenizer(file.metadata, directory)
        write_tensors(
            file.tensors,
            directory,
            permuted_heads=_permuted_heads(file),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    except InputError as error:
        raise InputError(f"{source}: {error}", field="model", code=ExitCode.DATA) from None


def hugging_face_config(file: GgufFile) -> dict[str, Any]:
    """The contents of ``config.json`` for a GGUF file's metadata and tensors."""
    architecture = file.architecture
    if architecture not in ARCHITECTURES or file.whole("expert_count", default=0, minimum=0):
        raise InputError(
            f"architecture {architecture!r} is not supported; known: "
            f"{', '.join(ARCHITECTURES)}, without experts",
            field="model",
        )
    hidden_size, num_heads = file.whole("embedding_length"), file.whole("attention.head_count")
    window = file.whole("attention.sliding_window", default=0, minimum=0) or None
    return {
        "model_type": "mistral" if architecture == "llama" and window else architecture,
        "hidden_size": hidden_size,
        "intermediate_size": file.whole("feed_forward_length"),
        "num_hidden_layers": file.whole("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.whole("attention.head_count_kv", default=num_heads),
        "head_dim": file.whole("attention.key_length", default=hidden_size // num_heads),
        "vocab_size": _vocab_size(file),
        "max_position_embeddings": file.whole("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(file),
        "attention_bias": find_tensor(file.tensors, "blk.0.attn_q.bias") is not None,
        "tie_word_embeddings": find_tensor(file.tensors, "output.weight") is None,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "dtype": "float32",
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(file.metadata),
    }


def _vocab_size(file: GgufFile) -> int:
    embedding = find_tensor(file.tensors, "token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError("there is no matrix token_embd.weight", field="model")
    return embedding.shape[0]


def _end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """End of sequence, of turn and of message, as far as the file has them."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(metadata[key] for key in keys if key in metadata))


def _permuted_heads(file: GgufFile) -> dict[str, int]:
    """Heads of the projections whose rows a llama file stores as interleaved rotation pairs."""
    if file.architecture != "llama":
        return {}
    num_heads = file.whole("attention.head_count")
    return {"attn_q": num_heads, "attn_k": file.whole("attention.head_count_kv", default=num_heads)}


def _rope_parameters(file: GgufFile) -> dict[str, Any]:
    theta = file.number("rope.freq_base", default=10000.0)
    factors = find_tensor(file.tensors, "rope_freqs.weight")
    if factors is not None:
        return _llama3_rope(factors.dequantize(), theta=theta)
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": kind, "rope_theta": theta, "factor": file.number("rope.scaling.factor")}
    if kind == "yarn":
        original = file.whole("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3_rope(factors: np.ndarray, *, theta: float) -> dict[str, Any]:
    """The rule behind a table of divisors: Llama 3.1 and later store the table alone."""
    factor, low, high = float(factors.max()), 1.0, 4.0
    frequencies = theta ** -(np.arange(len(factors)) / len(factors))
    turns = _LLAMA3_ORIGINAL_CONTEXT * frequencies / (2 * np.pi)
    kept = ((turns - low) / (high - low)).clip(0, 1)
    if not np.allclose(1 / factors, kept + (1 - kept) / factor, rtol=1e-3):
        raise InputError(
            "its table of RoPE factors follows no known rule; "
            "use the model's Hugging Face directory",
            field="model",
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }


def _read_gguf(path: Path) -> GgufFile:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            "reading GGUF needs the package 'gguf'; install it, or convert on another "
            "machine and give the directory",
            field="model",
        ) from None
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = tuple(map(SourceTensor.of, reader.tensors))
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise InputError(
            f"this is no readable GGUF file ({error}); fetch it again", field="model"
        ) from None
    return GgufFile(metadata=metadata, tensors=tensors)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
