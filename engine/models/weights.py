"""The tensors of a decoder, from safetensors files or made at random.

Shape legend: V vocabulary, D hidden size; in ``qk_norm_HD`` H all query and key heads, D head dim.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsed.core import ExitCode, InputError
from sparsed.engine.models.config import ModelConfig
from sparsed.engine.models.linear import Linear

Read = Callable[[str, tuple[int, ...]], Tensor]
Part = tuple[str, tuple[int, ...]]
Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer; Q, K and V are one product, gate and up another."""

    input_norm_D: Tensor
    qkv: Linear
    qk_norm_HD: Tensor | None  # one row per query head, then one per key head
    output: Linear
    post_norm_D: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelWeights:
    """The whole decoder. ``num_bytes`` is what it holds on the device; on a CPU tied embeddings
    are held twice, plain for the look-up and packed for the logits."""

    embedding_VD: Tensor
    layers: tuple[LayerWeights, ...]
    norm_D: Tensor
    head: Linear
    num_bytes: int


def load_weights(
    directory: Path,
    *,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = lambda frac: None,
) -> ModelWeights:
    """Read ``model.safetensors`` or the shards of its index, memory-mapped, tensor by tensor.

    Errors: InputError naming the file or tensor that is missing, truncated or of another shape.
    """
    read = _Checkpoint(directory).read
    return _Assembler(read, device=device, dtype=dtype).model(config, progress)


def random_weights(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    progress: Progress = lambda frac: None,
) -> ModelWeights:
    """Weights drawn on the device, scaled by fan-in so that hidden states and logits stay finite.

    The same seed, device type and dtype give the same weights.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, device=device, dtype=dtype)
        if len(shape) == 1:
            return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        return tensor.normal_(std=shape[1] ** -0.5, generator=generator)

    return _Assembler(read, device=device, dtype=dtype).model(config, progress)


class _Checkpoint:
    """The tensors of a directory by name; each file is mapped on first use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = _files_by_tensor(directory)
        self._opened: dict[str, Any] = {}

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, still mapped from its file; InputError if missing or of another shape."""
        if name not in self._files:
            raise InputError(
                f"{self._directory} has no tensor {name}", field="model", code=ExitCode.DATA
            )
        path = self._directory / self._files[name]
        try:
            tensor: Tensor = self._open(path).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from None
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}",
                field="model",
                code=ExitCode.DATA,
            )
        return tensor

    def _open(self, path: Path) -> Any:
        if path.name not in self._opened:
            self._opened[path.name] = safe_open(path, framework="pt")
        return self._opened[path.name]


class _Assembler:
    """Puts named tensors together into fused products on one device, in one dtype."""

    def __init__(self, read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        self._read = read
        self._device = device
        self._dtype = dtype
        self._num_bytes = 0

    def model(self, config: ModelConfig, progress: Progress) -> ModelWeights:
        hidden, vocab = config.hidden_size, config.vocab_size
        embedding_VD = self._tensor(("model.embed_tokens.weight", (vocab, hidden)))
        layers = []
        for number in range(config.num_layers):
            layers.append(self._layer(f"model.layers.{number}.", config))
            progress((number + 1) / (config.num_layers + 1))
        norm_D = self._tensor(("model.norm.weight", (hidden,)))
        if config.tie_embeddings:
            head = Linear(embedding_VD)
            self._num_bytes += head.copied_bytes
        else:
            head = Linear(self._tensor(("lm_head.weight", (vocab, hidden))))
        progress(1.0)
        return ModelWeights(
            embedding_VD=embedding_VD,
            layers=tuple(layers),
            norm_D=norm_D,
            head=head,
            num_bytes=self._num_bytes,
        )

    def _layer(self, prefix: str, config: ModelConfig) -> LayerWeights:
        hidden, inner = config.hidden_size, config.intermediate_size
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [(f"{attention}{letter}_proj", size) for letter, size in _qkv_sizes(config)]
        output = [(f"{attention}o_proj", hidden)]
        return LayerWeights(
            input_norm_D=self._tensor((prefix + "input_layernorm.weight", (hidden,))),
            qkv=self._linear(qkv, inputs=hidden, bias=config.attention_bias),
            qk_norm_HD=self._qk_norm(attention, config) if config.qk_norm else None,
            output=self._linear(output, inputs=config.q_size, bias=config.output_bias),
            post_norm_D=self._tensor((prefix + "post_attention_layernorm.weight", (hidden,))),
            gate_up=self._linear(
                [(mlp + "gate_proj", inner), (mlp + "up_proj", inner)], inputs=hidden
            ),
            down=self._linear([(mlp + "down_proj", hidden)], inputs=inner),
        )

    def _qk_norm(self, attention: str, config: ModelConfig) -> Tensor:
        rows = [
            self._tensor((f"{attention}{letter}_norm.weight", (config.head_dim,))).expand(count, -1)
            for letter, count in (("q", config.num_heads), ("k", config.num_kv_heads))
        ]
        return torch.cat(rows)

    def _linear(
        self, parts: Sequence[tuple[str, int]], *, inputs: int, bias: bool = False
    ) -> Linear:
        weight_OI = self._tensor(*((f"{name}.weight", (size, inputs)) for name, size in parts))
        if not bias:
            return Linear(weight_OI)
        return Linear(weight_OI, self._tensor(*((f"{name}.bias", (size,)) for name, size in parts)))

    def _tensor(self, *parts: Part) -> Tensor:
        """The parts one below the other, each copied once from where it is."""
        sizes = [shape[0] for _, shape in parts]
        shape = (sum(sizes), *parts[0][1][1:])
        whole = torch.empty(shape, device=self._device, dtype=self._dtype)
        for rows, (name, part_shape) in zip(torch.split(whole, sizes), parts, strict=True):
            rows.copy_(self._read(name, part_shape))
        self._num_bytes += whole.nbytes
        return whole


def _qkv_sizes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    return zip("qkv", (config.q_size, config.kv_size, config.kv_size), strict=True)


def _files_by_tensor(directory: Path) -> Mapping[str, str]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single.name)
        except (OSError, SafetensorError) as error:
            raise _damaged(single, error) from None
    if not index.is_file():
        raise InputError(
            f"{directory} holds neither {single.name} nor {index.name}",
            field="model",
            code=ExitCode.DATA,
        )
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): Path(file).name for tensor, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is damaged or incomplete ({error}); fetch it again",
        field="model",
        code=ExitCode.DATA,
    )
