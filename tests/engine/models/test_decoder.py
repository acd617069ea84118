"""The decoder against the transformers library: same logits, same greedy tokens."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor

from sparsed.engine.models import decoder as decoder_module
from sparsed.engine.models.config import FAMILIES, load_config
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.models.rope_config import ROPE_KINDS
from sparsed.engine.models.weights import load_weights
from sparsed.kernels.gate import silu_mul

TinyCheckpoint = Callable[..., Path]
PROMPT_TOKENS = 150  # beyond the 64 positions before scaling, so that each RoPE variant acts


SMOLLM2_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"  # names and float32 bytes, in name order


class DenseCache:
    """Attention of one sequence over all of its keys, which it keeps in lists."""

    def __init__(self, num_layers: int) -> None:
        self._keys: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._values: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, /) -> Tensor:
        self._keys[layer].append(k_NKD)
        self._values[layer].append(v_NKD)
        keys, values = torch.cat(self._keys[layer]), torch.cat(self._values[layer])
        mask = torch.ones(len(q_NHD), len(keys), dtype=torch.bool).tril(len(keys) - len(q_NHD))
        q, k, v = (x.transpose(0, 1)[None] for x in (q_NHD, keys, values))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return o[0].transpose(0, 1)


class Sequence:
    """One sequence under a decoder: ``extend`` it and get the logits of the new tokens."""

    def __init__(self, decoder: Decoder, prompt_tokens: int) -> None:
        self._decoder = decoder
        self._cache = DenseCache(decoder.config.num_layers)
        self._prompt_tokens = prompt_tokens
        self._length = 0

    def extend(self, tokens_N: Tensor) -> Tensor:
        positions_N = torch.arange(self._length, self._length + len(tokens_N))
        self._length += len(tokens_N)
        lengths_N = (positions_N + 1).clamp(min=self._prompt_tokens)
        hidden = self._decoder.forward(tokens_N, positions_N, self._cache, lengths_N=lengths_N)
        return self._decoder.logits(hidden)


def greedy(decoder: Decoder, prompt_N: Tensor, *, count: int, chunk: int) -> list[int]:
    """``count`` greedy tokens after a prompt that is computed in chunks."""
    sequence = Sequence(decoder, len(prompt_N))
    for part in prompt_N.split(chunk):
        logits = sequence.extend(part)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(sequence.extend(torch.tensor(tokens[-1:]))[-1].argmax()))
    return tokens


def load_decoder(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = load_config(directory)
    weights = load_weights(directory, config=config, device=torch.device("cpu"), dtype=dtype)
    return Decoder(config, weights)


def load_oracle(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()


def oracle_greedy(directory: Path, prompt_N: Tensor, *, count: int) -> list[int]:
    """transformers' own greedy generation, which never stops early."""
    model = load_oracle(directory)
    model.generation_config.eos_token_id = None
    tokens = model.generate(
        prompt_N[None],
        attention_mask=torch.ones_like(prompt_N)[None],
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[0, len(prompt_N) :].tolist()


def _tokens(count: int, *, seed: int = 0, vocab_size: int = 320) -> Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: TinyCheckpoint) -> Decoder:
    return load_decoder(tiny_checkpoint("llama"))


@pytest.mark.parametrize("rope", ROPE_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_transformers(
    tiny_checkpoint: TinyCheckpoint, family: str, rope: str
) -> None:
    directory = tiny_checkpoint(family, rope)
    decoder, prompt = load_decoder(directory), _tokens(PROMPT_TOKENS)
    with torch.inference_mode():
        expected = load_oracle(directory)(prompt[None]).logits[0]
    logits = Sequence(decoder, len(prompt)).extend(prompt)
    torch.testing.assert_close(logits, expected, atol=3e-4, rtol=1e-4)
    chunked = greedy(decoder, prompt, count=40, chunk=47)
    assert chunked == oracle_greedy(directory, prompt, count=40)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"head_dim": 24}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
        ("mistral", {"sliding_window": 4096}),
    ],
)
def test_variants_equal_transformers(
    tiny_checkpoint: TinyCheckpoint, family: str, overrides: dict[str, Any]
) -> None:
    directory = tiny_checkpoint(family, **overrides)
    prompt, oracle = _tokens(60), load_oracle(directory)
    decoder = load_decoder(directory)
    with torch.inference_mode():
        expected = oracle(prompt[None]).logits[0]
    logits = Sequence(decoder, len(prompt)).extend(prompt)
    torch.testing.assert_close(logits, expected, atol=3e-4, rtol=1e-4)
    assert decoder.config.num_parameters == sum(p.numel() for p in oracle.parameters())


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_change_the_logits(tiny: Decoder, chunk: int) -> None:
    prompt = _tokens(64)
    whole = Sequence(tiny, len(prompt)).extend(prompt)
    sequence = Sequence(tiny, len(prompt))
    parts = torch.cat([sequence.extend(part) for part in prompt.split(chunk)])
    torch.testing.assert_close(parts, whole, atol=3e-4, rtol=1e-4)


def test_requests_share_a_forward(tiny: Decoder) -> None:
    """Tokens of two sequences in one call: each only sees what its attention gives it."""
    first, second = _tokens(30, seed=1), _tokens(17, seed=2)
    caches = DenseCache(2), DenseCache(2)

    def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, /) -> Tensor:
        parts = zip(*(x.split([30, 17]) for x in (q_NHD, k_NKD, v_NKD)), strict=True)
        pairs = zip(caches, parts, strict=True)
        return torch.cat([cache(layer, *part) for cache, part in pairs])

    positions = torch.cat((torch.arange(30), torch.arange(17)))
    both = tiny.logits(tiny.forward(torch.cat((first, second)), positions, attend))
    alone = torch.cat([Sequence(tiny, len(part)).extend(part) for part in (first, second)])
    torch.testing.assert_close(both, alone, atol=3e-4, rtol=1e-4)


def test_attend_gets_the_layer_and_typed_heads(tiny_checkpoint: TinyCheckpoint) -> None:
    decoder = load_decoder(tiny_checkpoint("qwen3"), dtype=torch.bfloat16)
    seen = []

    def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, /) -> Tensor:
        seen.append((layer, q_NHD.shape, k_NKD.shape, v_NKD.shape))
        assert {x.dtype for x in (q_NHD, k_NKD, v_NKD)} == {torch.bfloat16}
        assert {x.stride()[1:] for x in (q_NHD, k_NKD, v_NKD)} == {(16, 1)}
        return torch.zeros_like(q_NHD)

    hidden = decoder.forward(_tokens(5), torch.arange(5), attend)
    assert seen == [(layer, (5, 4, 16), (5, 2, 16), (5, 2, 16)) for layer in range(2)]
    assert hidden.shape == (5, 64)
    assert decoder.logits(hidden[-1:]).dtype == torch.float32


def test_bfloat16_stays_close_to_float32(tiny_checkpoint: TinyCheckpoint) -> None:
    directory, prompt = tiny_checkpoint("qwen2", initializer_range=0.05), _tokens(60)
    exact, rounded = (
        Sequence(load_decoder(directory, dtype), len(prompt)).extend(prompt).log_softmax(-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (exact.exp() * (exact - rounded)).sum(-1).max() < 1e-3  # nats


@pytest.mark.slow
class TestSmolLM2:
    """Real weights, dequantised and put in order by our own conversion."""

    TEXT = "The capital of France is"

    def test_weights_are_the_known_ones(self, smollm2: Path) -> None:
        digest = hashlib.sha256()
        for name, values in sorted(load_file(smollm2 / "model.safetensors").items()):
            digest.update(name.encode() + values.tobytes())
        assert digest.hexdigest() == SMOLLM2_SHA256

    def test_config(self, smollm2: Path) -> None:
        config = load_config(smollm2)
        assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
        assert (config.max_position, config.rope.theta) == (8192, 100000.0)
        assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
        assert config.num_parameters == 134_515_008

    def test_greedy_tokens_equal_transformers(self, smollm2: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
        prompt = torch.tensor(tokenizer.encode(self.TEXT).ids)
        decoder = load_decoder(smollm2)
        tokens = greedy(decoder, prompt, count=64, chunk=3)
        assert tokens == oracle_greedy(smollm2, prompt, count=64)
        assert tokenizer.decode(tokens).startswith(" Paris")


def test_a_layer_keeps_nothing_of_what_was_computed_on_its_way(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer attends, nothing of the layer before it but the hidden states is alive; when
    gate and up are made, nothing of the attention."""
    made: list[weakref.ref[Tensor]] = []

    def noted(x: Tensor) -> Tensor:
        made.append(weakref.ref(x))
        return x

    def alive() -> int:
        return sum(ref() is not None for ref in made)

    def attend(_layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, /) -> Tensor:
        assert alive() == 0
        for tensor in (q_NHD, k_NKD, v_NKD):
            noted(tensor)
        return noted(torch.zeros_like(q_NHD))

    def gated(gate_up_NF: Tensor) -> Tensor:
        assert alive() == 0
        return noted(silu_mul(noted(gate_up_NF)))

    monkeypatch.setattr(decoder_module, "silu_mul", gated)
    directory = tiny_checkpoint("llama")
    config = load_config(directory)
    weights = load_weights(
        directory, config=config, device=torch.device("cpu"), dtype=torch.float32
    )
    Decoder(config, weights).forward(torch.arange(20), torch.arange(20), attend)
    assert len(made) == config.num_layers * 6
