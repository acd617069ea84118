"""Reading config.json: both generations of keys, every family, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsed.core import InputError
from sparsed.engine.models.config import FAMILIES, load_config, parse_config
from sparsed.engine.models.dummy import DUMMY_SHAPES, dummy_config

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}


def _values(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": family} | SIZES | changes


def test_old_and_new_rope_keys_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 1024}
    old = _values(rope_theta=5e5, rope_scaling=scaling | {"type": "llama3"}, torch_dtype="bfloat16")
    parameters = scaling | {"rope_type": "llama3", "rope_theta": 5e5}
    new = _values(rope_parameters=parameters, dtype="bfloat16")
    assert parse_config(old) == parse_config(new)
    assert parse_config(new).rope.theta == 5e5


@pytest.mark.parametrize(
    ("family", "attention_bias", "output_bias", "qk_norm", "head_dim"),
    [
        ("llama", False, False, False, 16),
        ("mistral", False, False, False, 16),
        ("qwen2", True, False, False, 16),
        ("qwen3", False, False, True, 128),
    ],
)
def test_what_a_family_implies(
    family: str, attention_bias: bool, output_bias: bool, qk_norm: bool, head_dim: int
) -> None:
    config = parse_config(_values(family))
    assert (config.attention_bias, config.output_bias) == (attention_bias, output_bias)
    assert (config.qk_norm, config.head_dim) == (qk_norm, head_dim)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 4096),
        ({"type": "linear", "factor": 4.0}, 16384),
        ({"type": "dynamic", "factor": 2.0}, 8192),
        ({"type": "yarn", "factor": 4.0}, 16384),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}, 4096),
    ],
)
def test_usable_context(rope: dict[str, Any] | None, context: int) -> None:
    assert parse_config(_values(rope_scaling=rope)).max_position == context


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("llama", {"sliding_window": 1024}, None),  # llama has none, whatever the file says
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 1024}, 1024),
        ("mistral", {"max_position_embeddings": 32768}, 4096),  # the family's default
        ("qwen2", {"sliding_window": 1024}, None),
        ("qwen2", {"sliding_window": 1024, "use_sliding_window": True}, None),  # from layer 28
        (
            "qwen2",
            {"sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 2},
            1024,
        ),
        ("qwen3", {"sliding_window": 1024, "layer_types": ["full_attention"] * 3}, None),
        (
            "qwen3",
            {"sliding_window": 1024, "layer_types": ["full_attention", "sliding_attention"]},
            1024,
        ),
    ],
)
def test_an_active_sliding_window_limits_the_context(
    family: str, changes: dict[str, Any], window: int | None
) -> None:
    values = _values(family, **changes)
    config = parse_config(values)
    assert config.sliding_window == window
    assert config.max_position == (window or values["max_position_embeddings"])


def test_generation_defaults() -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [8, 9]}
    config = parse_config(_values(eos_token_id=7, bos_token_id=1), generation)
    defaults = config.generation
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.9, 20)
    assert defaults.min_p is None
    assert config.eos_token_ids == (8, 9, 7)
    assert config.bos_token_id == 1


def test_generation_that_does_not_sample_is_greedy() -> None:
    generation = {"do_sample": False, "temperature": 0.6}
    assert parse_config(_values(), generation).generation.temperature == 0.0


def test_unknown_family_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'gpt2'.*" + ", ".join(FAMILIES)):
        parse_config(_values("gpt2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_act": 3}, "hidden_act=3"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"eos_token_id": ["a"]}, "eos_token_id"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": [1]}, "RoPE"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'.*default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "below 1"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_config(_values(**changes))
    assert caught.value.field == "model"


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe{"])
def test_a_broken_file_is_named(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_config(tmp_path)


def test_both_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_values()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 7}))
    assert load_config(tmp_path).generation.top_k == 7


@pytest.mark.parametrize(
    ("shape", "num_parameters"),  # as the models' own pages and files count them
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen3-14b", 14_768_307_200),
    ],
)
def test_dummy_shapes_have_the_size_of_the_models(shape: str, num_parameters: int) -> None:
    assert dummy_config(f"dummy:{shape}").shape.num_parameters == num_parameters


def test_unknown_dummy_lists_the_known() -> None:
    with pytest.raises(InputError, match=", ".join(DUMMY_SHAPES)):
        dummy_config("dummy:gpt-5")


def test_the_catalogue_never_loads_torch() -> None:
    code = "import sys, sparsed.engine.models.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
