"""Shapes of known models, for ``dummy:<shape>``: random weights, no file."""

from __future__ import annotations

from sparsed.core import InputError
from sparsed.engine.models.config import ModelConfig
from sparsed.engine.models.rope_config import RopeConfig

DUMMY_PREFIX = "dummy:"

DUMMY_SHAPES: dict[str, ModelConfig] = {
    "llama-3.1-8b": ModelConfig(
        family="llama",
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=128256,
        max_position=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(
            kind="llama3",
            theta=500000.0,
            factor=8.0,
            original_max_position=8192,
        ),
        dtype="bfloat16",
        eos_token_ids=(128001, 128008, 128009),
        bos_token_id=128000,
    ),
    "qwen2.5-1.5b": ModelConfig(
        family="qwen2",
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        hidden_size=1536,
        intermediate_size=8960,
        vocab_size=151936,
        max_position=131072,
        rope=RopeConfig(theta=1000000.0),
        attention_bias=True,
        tie_embeddings=True,
        dtype="bfloat16",
        eos_token_ids=(151643,),
    ),
    "qwen3-14b": ModelConfig(
        family="qwen3",
        num_layers=40,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        hidden_size=5120,
        intermediate_size=17408,
        vocab_size=151936,
        max_position=40960,
        rope=RopeConfig(theta=1000000.0),
        qk_norm=True,
        dtype="bfloat16",
        eos_token_ids=(151645, 151643),
    ),
    "tiny": ModelConfig(
        family="llama",
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=512,
        max_position=8192,
        tie_embeddings=True,
    ),
}


def dummy_config(reference: str) -> ModelConfig:
    """The config of ``dummy:<shape>``; InputError listing the known shapes."""
    shape = reference.removeprefix(DUMMY_PREFIX)
    if shape not in DUMMY_SHAPES:
        known = ", ".join(DUMMY_SHAPES)
        raise InputError(f"unknown dummy shape {shape!r}; known: {known}", field="model")
    return DUMMY_SHAPES[shape]
