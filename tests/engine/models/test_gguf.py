"""GGUF files written here, converted, and compared with what they were made from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from sparsed.core import InputError
from sparsed.engine.models.config import load_config
from sparsed.engine.models.gguf import convert_gguf

Kind = GGMLQuantizationType
WRITABLE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
READ_ONLY = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)  # the gguf package cannot write them
PARTS = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
BYTE_TOKENS = [*"Ġabcdefgh0123456789", "ab", "abc", "Ġa", "Ġab", "12", "<|end|>", "<unused>"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": BYTE_TOKENS,
    "tokenizer.ggml.token_type": [1] * (len(BYTE_TOKENS) - 2) + [3, 5],
    "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a", "Ġ ab", "1 2"],
    "tokenizer.ggml.bos_token_id": BYTE_TOKENS.index("<|end|>"),
    "tokenizer.ggml.eos_token_id": BYTE_TOKENS.index("<|end|>"),
    "tokenizer.chat_template": "{{ messages }}",
}


def _gguf_name(name: str) -> str:
    *path, part, suffix = name.split(".")
    layer = f"blk.{path[2]}." if "layers" in path else ""
    return f"{layer}{PARTS[part]}.{suffix}"


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from halves (i, i + D/2) to pairs, as llama files have them."""
    order = np.arange(len(values)).reshape(heads, 2, -1).transpose(0, 2, 1).ravel()
    return values[order]


def _metadata(directory: Path, **changes: Any) -> dict[str, Any]:
    config = json.loads((directory / "config.json").read_text())
    name = "llama" if config["model_type"] == "mistral" else config["model_type"]
    architecture = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
    }
    values = {f"{name}.{key}": value for key, value in architecture.items()}
    return {"general.architecture": name} | values | TOKENIZER | changes


def _write(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, Kind]]
) -> Path:
    writer = GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture" and value is not None:
            _add(writer, key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    adders[type(value)](key, value)


def _source(directory: Path, kind: Kind) -> dict[str, tuple[np.ndarray, Kind]]:
    """The checkpoint's tensors as a GGUF file has them: matrices in ``kind``, vectors in F32."""
    config = load_config(directory)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    tensors = {}
    for name, values in load_file(directory / "model.safetensors").items():
        part = name.split(".")[-2]
        if config.family in ("llama", "mistral") and part in heads:
            values = _interleave(values, heads[part])
        of_kind = kind if values.ndim == 2 else Kind.F32
        tensors[_gguf_name(name)] = (quantize(values, of_kind), of_kind)
    return tensors


def _convert(source: Path, **options: Any) -> Path:
    directory = source.with_suffix("")
    directory.mkdir()
    convert_gguf(source, directory, progress=lambda frac: None, **options)
    return directory


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_float_tensors_and_config_survive(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    original = tiny_checkpoint(family, **overrides)
    path = _write(tmp_path / "m.gguf", _metadata(original), _source(original, Kind.F32))
    converted = _convert(path)
    expected = load_file(original / "model.safetensors")
    found = load_file(converted / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    ours, theirs = load_config(converted), load_config(original)
    assert ours.shape == theirs.shape
    assert (ours.qk_norm, ours.attention_bias, ours.output_bias, ours.tie_embeddings) == (
        theirs.qk_norm,
        theirs.attention_bias,
        theirs.output_bias,
        theirs.tie_embeddings,
    )
    assert ours.rope == theirs.rope


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
def test_quantized_tensors_come_back_close(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, kind: Kind
) -> None:
    original = tiny_checkpoint("llama")
    converted = _convert(_write(tmp_path / "m.gguf", _metadata(original), _source(original, kind)))
    bits = GGML_QUANT_SIZES[kind][1] * 8 / GGML_QUANT_SIZES[kind][0]
    found = load_file(converted / "model.safetensors")
    for name, expected in load_file(original / "model.safetensors").items():
        assert found[name].dtype == np.float32
        error = np.abs(found[name] - expected).max() / np.abs(expected).max()
        assert error <= 2.0 ** (2 - min(int(bits), 9)), name


@pytest.mark.parametrize("kind", READ_ONLY, ids=lambda kind: kind.name)
def test_super_block_types_are_read(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, kind: Kind
) -> None:
    """Random blocks: rows of 256 values are whole super-blocks, and no scale is infinite."""
    original = tiny_checkpoint("qwen2", hidden_size=256, intermediate_size=256)
    tensors = _source(original, Kind.F32)
    values, raw_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 0x30, (256, 256 // values * raw_bytes), dtype=np.uint8)
    tensors["blk.1.ffn_up.weight"] = (raw, kind)
    converted = _convert(_write(tmp_path / "m.gguf", _metadata(original), tensors))
    found = load_file(converted / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert found.shape == (256, 256)
    assert np.array_equal(found, dequantize(raw, kind))


def test_large_files_become_shards(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = tiny_checkpoint("qwen3")
    path = _write(tmp_path / "m.gguf", _metadata(original), _source(original, Kind.F32))
    converted = _convert(path, max_shard_bytes=100_000)
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    expected = load_file(original / "model.safetensors")
    assert index["weight_map"].keys() == expected.keys()
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert np.array_equal(load_file(converted / file)[name], expected[name])


def _llama3_table(factor: float) -> np.ndarray:
    """Divisors of the frequencies of 8 pairs, at theta 5000, as the published rule gives them."""
    divisors = []
    for pair in range(8):
        wavelength = 2 * np.pi * 5000.0 ** (pair / 8)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_rope_scaling_is_found(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = tiny_checkpoint("llama")
    tensors = _source(original, Kind.F32)
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    path = _write(tmp_path / "yarn.gguf", _metadata(original, **yarn), tensors)
    rope = load_config(_convert(path)).rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("yarn", 4.0, 32)

    table = {"rope_freqs.weight": (_llama3_table(8.0), Kind.F32)}
    metadata = _metadata(original) | {"llama.rope.freq_base": 5e5}
    with pytest.raises(InputError, match="follows no known rule"):
        _convert(_write(tmp_path / "odd.gguf", metadata, tensors | table))
    path = _write(tmp_path / "llama3.gguf", _metadata(original), tensors | table)
    rope = load_config(_convert(path)).rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("llama3", 8.0, 8192)


def test_byte_level_tokenizer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = tiny_checkpoint("llama")
    path = _write(tmp_path / "m.gguf", _metadata(original), _source(original, Kind.F32))
    converted = _convert(path)
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    encoded = tokenizer.encode("abc ab12<|end|>")
    assert encoded.tokens == ["abc", "Ġab", "1", "2", "<|end|>"]  # digits stay apart
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "abc ab12<|end|>"
    assert tokenizer.token_to_id("<unused>") is None
    config = json.loads((converted / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["chat_template"]) == ("<|end|>", "{{ messages }}")
    assert load_config(converted).eos_token_ids == (BYTE_TOKENS.index("<|end|>"),)


def test_sentence_piece_tokenizer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = tiny_checkpoint("llama")
    pieces = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA4>"]
    pieces += ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc"]
    scores = [0.0] * 5 + [-9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -4.0, -1.0]
    tokenizer_values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, *[1] * 8],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    metadata = _metadata(original, **tokenizer_values)
    path = _write(tmp_path / "m.gguf", metadata, _source(original, Kind.F32))
    tokenizer = Tokenizer.from_file(str(_convert(path) / "tokenizer.json"))
    encoded = tokenizer.encode("abc ab ä</s>")
    # the best-scored pair of neighbours merges first: bc before ab, ab before the word's start
    assert encoded.tokens == ["<s>", "▁a", "bc", "▁ab", "▁", "<0xC3>", "<0xA4>", "</s>"]
    assert tokenizer.decode(encoded.ids) == "abc ab ä"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gpt2"}, "architecture 'gpt2'.*llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "without experts"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5'"),
        ({"tokenizer.ggml.pre": "klingon"}, "pre-tokenizer 'klingon'.*smollm"),
        ({"tokenizer.ggml.merges": None}, "its tokenizer is damaged .*tokenizer.ggml.merges"),
    ],
)
def test_unsupported_files_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    original = tiny_checkpoint("llama")
    metadata = _metadata(original, **changes)
    path = _write(tmp_path / "m.gguf", metadata, _source(original, Kind.F32))
    with pytest.raises(InputError, match=message):
        _convert(path)


def test_unknown_tensors_and_types_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    original = tiny_checkpoint("llama")
    tensors = _source(original, Kind.F32)
    extra = {"blk.0.ssm_in.weight": (np.zeros((4, 4), np.float32), Kind.F32)}
    with pytest.raises(InputError, match=r"a\.gguf: unknown tensor blk\.0\.ssm_in\.weight"):
        _convert(_write(tmp_path / "a.gguf", _metadata(original), tensors | extra))
    integers = {"output_norm.weight": (np.zeros(64, np.int8), Kind.I8)}
    with pytest.raises(InputError, match=r"output_norm\.weight is of type I8"):
        _convert(_write(tmp_path / "b.gguf", _metadata(original), tensors | integers))


@pytest.mark.parametrize("kept_frac", [0.0, 0.0005, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, kept_frac: float
) -> None:
    original = tiny_checkpoint("llama")
    path = _write(tmp_path / "cut.gguf", _metadata(original), _source(original, Kind.F32))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept_frac)])
    with pytest.raises(InputError, match=r"cut\.gguf: this is no readable GGUF file"):
        _convert(path)


@pytest.fixture(scope="module")
def small_file(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """The bytes of a file that converts; the first 2,500 hold its metadata."""
    original = tiny_checkpoint("llama", num_hidden_layers=1)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return _write(path, _metadata(original), _source(original, Kind.F32)).read_bytes()


@settings(max_examples=100, derandomize=True)
@given(flips=st.lists(st.tuples(st.integers(0, 2499), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_metadata_never_raises_anything_else(
    small_file: bytes, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(small_file)
    for position, value in flips:
        content[position] = value
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        path = Path(folder) / "flipped.gguf"
        path.write_bytes(content)
        try:
            _convert(path)
        except InputError as error:
            assert "flipped.gguf" in str(error)


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("this is no model\n" * 100)
    with pytest.raises(InputError, match=r"text\.gguf: this is no readable GGUF file"):
        _convert(path)
