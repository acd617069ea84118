"""Loading safetensors, damaged ones included, and drawing random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsed.core import InputError
from sparsed.engine.models.config import ModelConfig, load_config
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.models.linear import Linear
from sparsed.engine.models.weights import ModelWeights, load_weights, random_weights

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "model")


def _load(directory: Path) -> ModelWeights:
    config = load_config(directory)
    return load_weights(directory, config=config, device=CPU, dtype=torch.float32)


def _logits(config: ModelConfig, weights: ModelWeights) -> torch.Tensor:
    decoder = Decoder(config, weights)
    tokens = torch.arange(6)
    hidden = decoder.forward(tokens, tokens, lambda _, q_NHD, k_NKD, v_NKD: q_NHD)
    return decoder.logits(hidden)


def _shard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    index_path = directory / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"weight_map": files}))
    (directory / "model.safetensors").unlink()


def test_shards_equal_a_single_file(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    single = _logits(config, _load(checkpoint))
    _shard(checkpoint)
    assert torch.equal(_logits(config, _load(checkpoint)), single)


def test_num_bytes_counts_what_is_held(checkpoint: Path) -> None:
    assert _load(checkpoint).num_bytes >= 4 * load_config(checkpoint).num_parameters
    repeated_norms = 4 * 16 * (6 - 2) * 2  # one row per head, not one per kind
    assert (
        _load(checkpoint).num_bytes <= 4 * load_config(checkpoint).num_parameters + repeated_norms
    )


def test_progress_ends_at_one(checkpoint: Path) -> None:
    fracs: list[float] = []
    config = load_config(checkpoint)
    load_weights(checkpoint, config=config, device=CPU, dtype=torch.float32, progress=fracs.append)
    assert fracs == sorted(fracs)
    assert fracs[-1] == 1.0


@pytest.mark.parametrize("kept_frac", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named(checkpoint: Path, kept_frac: float) -> None:
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept_frac)])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        _load(checkpoint)


def test_a_truncated_shard_is_named(checkpoint: Path) -> None:
    _shard(checkpoint)
    path = checkpoint / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model-1\.safetensors is damaged"):
        _load(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    _shard(checkpoint)
    (checkpoint / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-2\.safetensors"):
        _load(checkpoint)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(checkpoint: Path, content: str) -> None:
    _shard(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json is damaged"):
        _load(checkpoint)


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds neither model\.safetensors"):
        _load(checkpoint)


def test_a_missing_or_misshapen_tensor_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_norm.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(InputError, match=f"no tensor {name}"):
        _load(checkpoint)
    save_file(tensors | {name: torch.ones(8)}, path)
    with pytest.raises(InputError, match=rf"{name} has shape \(8,\), config.json asks"):
        _load(checkpoint)


def test_random_weights_are_seeded_and_finite() -> None:
    config = dummy_config("dummy:tiny")
    first, same, other = (
        _logits(config, random_weights(config, device=CPU, dtype=torch.float32, seed=seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.isfinite().all()
    assert 0.1 < first.std() < 10


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_product_equals_the_plain_one(num_rows: int, biased: bool) -> None:
    x_NI, weight_OI = torch.randn(num_rows, 72), torch.randn(56, 72)
    bias_O = torch.randn(56) if biased else None
    expected = x_NI @ weight_OI.T + (bias_O if bias_O is not None else 0)
    torch.testing.assert_close(Linear(weight_OI, bias_O)(x_NI), expected, atol=1e-4, rtol=1e-4)


def test_half_precision_without_packing_is_right() -> None:
    x_NI, weight_OI = torch.randn(2, 8).half(), torch.randn(4, 8).half()
    linear = Linear(weight_OI)
    assert linear.copied_bytes == 0
    assert torch.equal(linear(x_NI), x_NI @ weight_OI.T)
