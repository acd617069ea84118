"""Text to token ids and back, from the files of a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from sparsed.controller.chat_template import ChatTemplate
from sparsed.core import InputError

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A ``tokenizers`` backend with what the model's other files say about its text.

    Safe to call from threads. Encoding of the same text gives the same ids as the transformers
    library on the same directory.
    """

    backend: Backend
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token" -> its text
    chat_template: ChatTemplate | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where they exist, the files beside it.

        Errors: InputError naming the file that is missing or broken.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist; the model needs a fast tokenizer file")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for any broken file
            raise InputError(f"{path} is not a tokenizer file: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        return cls(
            backend=backend,
            special_tokens=special_tokens,
            chat_template=_chat_template(directory, config=config),
            eos_token_ids=_eos_token_ids(directory, backend=backend, special=special_tokens),
        )

    @classmethod
    def of_bytes(cls, *, vocab_size: int = 256) -> Tokenizer:
        """A tokenizer without files, for dummy models: the ids of a text are its UTF-8 bytes.

        Ids from 256 up to ``vocab_size`` never come out of a text; they read as ``<id>``.
        """
        vocabulary = {char: byte for byte, char in enumerate(_byte_alphabet())}
        vocabulary |= {f"<{token_id}>": token_id for token_id in range(256, vocab_size)}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend=backend, chat_template=ChatTemplate(PLAIN_CHAT_TEMPLATE))

    @property
    def vocab_size(self) -> int:
        """Ids that mean something to the tokenizer; the model's own count may be larger."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def longest_token_chars(self) -> int:
        """No token covers more characters of a text than this."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of ``text``; InputError if it holds half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode at character {error.start}; remove the surrogate"
            ) from error
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ``token_ids``; unknown ids read as nothing, broken UTF-8 as U+FFFD."""
        return str(self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for inside a text, leading space included."""
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added_tokens:
            return piece.encode()
        if self._is_byte_level:
            return b"".join(self._piece_bytes.get(char, char.encode()) for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def is_silent(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether ``decode`` gives nothing for this id wherever it stands."""
        if self.backend.id_to_token(token_id) is None:
            return True
        return skip_special_tokens and self._added_tokens.get(token_id, False)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text of a conversation; ``variables`` reach the template by name.

        Errors: InputError if the model has no template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise InputError(
                "the model has no chat template; use /v1/completions with a plain prompt",
                field="messages",
            )
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special_tokens, **(variables or {})},
        )

    @cached_property
    def _added_tokens(self) -> dict[int, bool]:
        """Added token id -> whether it is special."""
        added = self.backend.get_added_tokens_decoder()
        return {token_id: bool(token.special) for token_id, token in added.items()}

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self.backend.to_str()).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        return any(part.get("type") == "ByteLevel" for part in parts)

    @cached_property
    def _piece_bytes(self) -> dict[str, bytes]:
        return {char: bytes([byte]) for byte, char in enumerate(_byte_alphabet())}


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary.

    Source: the GPT-2 tokenizer. Printable bytes stand for themselves, the others, in order, for
    the characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(0x100 + shifted.index(b)) for b in range(256)]


def _read_json(path: Path) -> dict[str, object]:
    """The object in ``path``, empty if there is no such file; InputError if it is broken."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Named special tokens; the files write a token as its text or as an object around it."""
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _chat_template(directory: Path, *, config: Mapping[str, object]) -> ChatTemplate | None:
    """The template in its own file, else the (default) one of the tokenizer's configuration."""
    path = directory / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = {item["name"]: item["template"] for item in source}.get("default")
    return ChatTemplate(source) if isinstance(source, str) else None


def _eos_token_ids(
    directory: Path, *, backend: Backend, special: Mapping[str, str]
) -> tuple[int, ...]:
    """Ids that end an answer: of generation_config.json, else the tokenizer's own."""
    declared = _read_json(directory / "generation_config.json").get("eos_token_id")
    if isinstance(declared, int):
        return (declared,)
    if isinstance(declared, list):
        return tuple(int(token_id) for token_id in declared)
    token_id = backend.token_to_id(special.get("eos_token", ""))
    return () if token_id is None else (int(token_id),)
