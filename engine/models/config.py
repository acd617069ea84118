"""What a decoder is made of, read from a Hugging Face ``config.json``. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsed.core import DTYPE_BYTES, ExitCode, InputError, ModelShape
from sparsed.engine.models.fields import Fields
from sparsed.engine.models.rope_config import RopeConfig, parse_rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_HEAD_DIMS = {"qwen3": 128}  # where config.json may leave it out
_SLIDING_WINDOWS = {"mistral": 4096}  # tokens, likewise


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """Sampling defaults of ``generation_config.json``; None: the file does not say."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder.

    ``max_position`` is the usable context in tokens: RoPE scaling extends it, an active sliding
    window limits it, so that inside of it attention is always full. ``eos_token_ids`` are those of
    both files. ``attention_bias`` is on Q, K and V, ``output_bias`` on the projection after.
    """

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys, and of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights in the checkpoint; tied embeddings count once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * self._layer_parameters + self.hidden_size

    @property
    def _layer_parameters(self) -> int:
        attention = 2 * self.hidden_size * (self.q_size + self.kv_size)
        biases = (self.q_size + 2 * self.kv_size) * self.attention_bias
        biases += self.hidden_size * self.output_bias
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        return attention + biases + norms + 3 * self.hidden_size * self.intermediate_size

    @property
    def shape(self) -> ModelShape:
        """The sizes that memory arithmetic needs."""
        return ModelShape(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            max_position=self.max_position,
            num_parameters=self.num_parameters,
            tied_embeddings=self.tie_embeddings,
        )


def load_config(directory: Path) -> ModelConfig:
    """Read ``config.json`` and, where present, ``generation_config.json``.

    Errors: InputError naming the file that is missing, broken or asks for what is unsupported.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; give a Hugging Face directory",
            field="model",
            code=ExitCode.DATA,
        )
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else None
    try:
        return parse_config(_read_json(path), generation)
    except InputError as error:
        raise InputError(f"{directory}: {error}", field="model", code=ExitCode.DATA) from None


def parse_config(
    values: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The config of a decoder from the contents of the two files, in either generation's keys.

    Errors: InputError naming the key, for unknown families and for features not supported.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"model_type {family!r} is not supported; known: {', '.join(FAMILIES)}", field="model"
        )
    fields = Fields(values)
    _refuse_unsupported(fields)
    num_heads = fields.whole("num_attention_heads")
    hidden_size = fields.whole("hidden_size")
    head_dim = fields.whole("head_dim", default=_HEAD_DIMS.get(family, hidden_size // num_heads))
    num_layers = fields.whole("num_hidden_layers")
    max_position = fields.whole("max_position_embeddings")
    rope = parse_rope(fields, max_position=max_position)
    window = _active_window(fields, family=family, num_layers=num_layers)
    context = rope.context_tokens(max_position)
    bias = family != "qwen2" and fields.flag("attention_bias")
    defaults = _parse_generation(Fields(generation or {}))
    return _checked(
        ModelConfig(
            family=family,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.whole("num_key_value_heads", default=num_heads),
            head_dim=head_dim,
            hidden_size=hidden_size,
            intermediate_size=fields.whole("intermediate_size"),
            vocab_size=fields.whole("vocab_size"),
            max_position=min(context, window or context),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            rope=rope,
            attention_bias=bias or family == "qwen2",
            output_bias=bias,
            qk_norm=family == "qwen3",
            tie_embeddings=fields.flag("tie_word_embeddings"),
            sliding_window=window,
            dtype=_parse_dtype(values),
            eos_token_ids=_union(defaults.eos_token_ids, fields.token_ids("eos_token_id")),
            bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
            generation=defaults,
        )
    )


def _checked(config: ModelConfig) -> ModelConfig:
    if config.num_heads % config.num_kv_heads:
        raise InputError(
            f"num_attention_heads={config.num_heads} is no multiple of "
            f"num_key_value_heads={config.num_kv_heads}; the config is damaged",
            field="model",
        )
    if config.head_dim % 2:
        raise InputError(f"head_dim={config.head_dim} is odd; RoPE needs pairs", field="model")
    return config


def _refuse_unsupported(fields: Fields) -> None:
    activation = fields.text("hidden_act", default="silu")
    if activation != "silu":
        raise InputError(f"hidden_act {activation!r} is not supported; known: silu", field="model")
    for key in ("mlp_bias", "quantization_config"):
        if fields.values.get(key):
            raise InputError(
                f"{key} is set, which is not supported; use a checkpoint without", field="model"
            )


def _active_window(fields: Fields, *, family: str, num_layers: int) -> int | None:
    """Tokens of the sliding window some layer uses; None if every layer attends to everything."""
    window = fields.optional_whole("sliding_window", absent=_SLIDING_WINDOWS.get(family))
    layer_types = fields.values.get("layer_types")
    if family == "llama" or (layer_types and "sliding_attention" not in layer_types):
        return None
    if family in ("qwen2", "qwen3") and not layer_types:
        first_layer = fields.whole("max_window_layers", default=28, minimum=0)
        if not fields.flag("use_sliding_window") or first_layer >= num_layers:
            return None
    return window


def _parse_dtype(values: Mapping[str, Any]) -> str:
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    name = name.removeprefix("torch.")
    if name not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise InputError(f"dtype {name!r} is not supported; known: {known}", field="model")
    return name


def _parse_generation(fields: Fields) -> GenerationDefaults:
    greedy = fields.values.get("do_sample") is False
    return GenerationDefaults(
        temperature=0.0 if greedy else fields.optional_number("temperature"),
        top_p=fields.optional_number("top_p"),
        top_k=fields.optional_whole("top_k"),
        min_p=fields.optional_number("min_p"),
        repetition_penalty=fields.optional_number("repetition_penalty"),
        max_new_tokens=fields.optional_whole("max_new_tokens"),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _union(*groups: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token for group in groups for token in group))


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", field="model") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object", field="model")
    return values
