"""The tokenizer inside a GGUF file, as a ``tokenizers`` tokenizer. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from sparsed.core import InputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)
_QWEN2_SPLIT = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _PreTokenizer:
    """How text is cut before merging; ``split`` None: the byte-level default expression."""

    split: str | None = None
    single_digits: bool = False
    normal_form_c: bool = False
    whole_words_first: bool = False
    starts_with_bos: bool = False


_LLAMA3 = _PreTokenizer(split=_LLAMA3_SPLIT, whole_words_first=True, starts_with_bos=True)
_QWEN2 = _PreTokenizer(split=_QWEN2_SPLIT, normal_form_c=True)
_PRE_TOKENIZERS = {  # by tokenizer.ggml.pre
    "default": _PreTokenizer(),
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _PreTokenizer(split=_TEKKEN_SPLIT, whole_words_first=True, starts_with_bos=True),
}


class _TokenType(IntEnum):
    """``tokenizer.ggml.token_type``; what is not named here is ordinary text."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


def write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Errors: InputError if a list is missing or damaged, or the kind is unknown.
    """
    try:
        tokenizer, config = build_tokenizer(metadata), tokenizer_config(metadata)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 -- tokenizers raises nothing narrower
        raise InputError(f"its tokenizer is damaged ({error!r})", field="model") from None
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE (``gpt2``) or SentencePiece BPE (``llama``) from the metadata."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata)
    elif kind == "llama":
        tokenizer = _sentence_piece(metadata)
    else:
        raise InputError(f"tokenizer {kind!r} is not supported; known: gpt2, llama", field="model")
    _add_special_tokens(tokenizer, metadata)
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``tokenizer_config.json``: named tokens and the chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    config: dict[str, Any] = {
        f"{name}_token": tokens[index] for name, index in ids.items() if index is not None
    }
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": starts_with_bos(metadata),
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def starts_with_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether encoding puts the begin token in front: the file's word, or its kind's habit."""
    pre = _pre_tokenizer(metadata)
    habit = metadata["tokenizer.ggml.model"] == "llama" or (pre is not None and pre.starts_with_bos)
    return bool(metadata.get("tokenizer.ggml.add_bos_token", habit))


def _pre_tokenizer(metadata: Mapping[str, Any]) -> _PreTokenizer | None:
    return _PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre", "default"))


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    pre = _pre_tokenizer(metadata)
    if pre is None:
        raise InputError(
            f"pre-tokenizer {metadata['tokenizer.ggml.pre']!r} is not supported; known: "
            f"{', '.join(_PRE_TOKENIZERS)}",
            field="model",
        )
    first, _, second = zip(
        *(m.partition(" ") for m in metadata["tokenizer.ggml.merges"]), strict=True
    )
    tokenizer = Tokenizer(
        BPE(
            vocab=_vocabulary(metadata),
            merges=list(zip(first, second, strict=True)),
            ignore_merges=pre.whole_words_first,
        )
    )
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.normal_form_c:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any]) -> Tokenizer:
    vocabulary = _vocabulary(metadata)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges_from_scores(vocabulary, metadata["tokenizer.ggml.scores"]),
            unk_token=None if unknown is None else metadata["tokenizer.ggml.tokens"][unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1, right=0)] if prefix else steps
    )
    return tokenizer


def _merges_from_scores(
    vocabulary: Mapping[str, int], scores: list[float]
) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score of the result first.

    SentencePiece merges the best-scored neighbours first, so its scores are the merge order.
    """
    merges = [
        (-scores[index], vocabulary[piece[:cut]], vocabulary[piece[cut:]], cut, piece)
        for piece, index in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return [(piece[:cut], piece[cut:]) for *_, cut, piece in sorted(merges)]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [_TokenType.NORMAL] * len(tokens))
    return {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != _TokenType.UNUSED
    }


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", ())
    added = {_TokenType.CONTROL: True, _TokenType.USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=added[_TokenType(kind)], normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in added
        ]
    )
    if starts_with_bos(metadata):
        index = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens[index]} $A",
            pair=f"{tokens[index]} $A {tokens[index]} $B",
            special_tokens=[(tokens[index], index)],
        )
