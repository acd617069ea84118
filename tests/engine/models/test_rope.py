"""RoPE frequencies and rotation against the transformers library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sparsed.engine.models.config import parse_config
from sparsed.engine.models.rope import Rope, rope_frequencies
from sparsed.kernels.rotate import rotate_heads

CPU = torch.device("cpu")
VARIANTS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
    },
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4},
    {"rope_type": "yarn", "factor": 1.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
]


def _configs(rope: dict[str, Any]) -> tuple[Any, LlamaConfig]:
    """Ours and theirs, from the same values."""
    values = {
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_theta": 20000.0} | rope,
    }
    return parse_config({"model_type": "llama"} | values), LlamaConfig(**values)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_frequencies_equal_transformers(variant: dict[str, Any]) -> None:
    config, oracle = _configs(variant)
    frequencies_F, scale = rope_frequencies(config.rope, head_dim=config.head_dim)
    expected_F, expected_scale = ROPE_INIT_FUNCTIONS[variant["rope_type"]](oracle, CPU)
    torch.testing.assert_close(frequencies_F, expected_F, rtol=1e-6, atol=0)
    assert scale == pytest.approx(expected_scale)


@settings(max_examples=30)
@given(length=st.integers(1, 20000), factor=st.floats(1.0, 32.0))
def test_dynamic_follows_the_length(length: int, factor: float) -> None:
    config, oracle = _configs({"rope_type": "dynamic", "factor": factor})
    rope = Rope(config.rope, head_dim=config.head_dim, device=CPU)
    positions_N = torch.tensor([0, length - 1])
    cos, sin = rope.tables(
        positions_N, lengths_N=torch.full_like(positions_N, length), dtype=torch.float32
    )
    frequencies_F, _ = ROPE_INIT_FUNCTIONS["dynamic"](oracle, CPU, seq_len=length)
    angles_NF = positions_N[:, None].float() * frequencies_F
    # an ulp of the frequency is 1e-7 of an angle that may be large
    tolerance = 1e-4 + 1e-6 * length
    torch.testing.assert_close(cos[:, 32:], angles_NF.cos(), rtol=0, atol=tolerance)
    torch.testing.assert_close(sin[:, 32:], angles_NF.sin(), rtol=0, atol=tolerance)


def test_without_lengths_a_token_sees_those_before_it() -> None:
    config, _ = _configs({"rope_type": "dynamic", "factor": 4.0})
    rope = Rope(config.rope, head_dim=config.head_dim, device=CPU)
    positions_N = torch.tensor([5, 3000, 8000])
    implied = rope.tables(positions_N, lengths_N=None, dtype=torch.float32)
    given_ = rope.tables(positions_N, lengths_N=positions_N + 1, dtype=torch.float32)
    assert all(map(torch.equal, implied, given_))


def test_rotation_equals_transformers() -> None:
    config, _ = _configs({"rope_type": "default"})
    rope = Rope(config.rope, head_dim=config.head_dim, device=CPU)
    positions_N, x_NHD = torch.arange(100, 109), torch.randn(9, 3, 64)
    angles = torch.outer(positions_N.float(), rope_frequencies(config.rope, head_dim=64)[0])
    angles = torch.cat((angles, angles), dim=1)[None]
    expected, _ = apply_rotary_pos_emb(
        x_NHD.transpose(0, 1)[None], x_NHD.transpose(0, 1)[None], angles.cos(), angles.sin()
    )
    tables = rope.tables(positions_N, lengths_N=None, dtype=torch.float32)
    torch.testing.assert_close(
        rotate_heads(x_NHD, *tables, norm_HD=None, eps=0.0), expected[0].transpose(0, 1)
    )
