import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparsed.controller.tokenizer import Tokenizer
from sparsed.core import InputError

TEXTS = (
    "",
    " ",
    "Hello world",
    "  two spaces,\n\n\tand a tab 12345 ",
    "it's def main():\r\n    return 1",
    "Größe naïveté 東京 🙂👩‍👩‍👧 e\u0301",
    "<|im_start|>user\nhi<|im_end|><s></s><|endoftext|>",
    "control \x00\x07 \u200b\ufeff",
)
CONVERSATIONS: tuple[Sequence[Mapping[str, str]], ...] = (
    [{"role": "user", "content": "Hi <b>&'\" there"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "naïve? 東京"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two\n"},
        {"role": "user", "content": "  three  "},
    ],
)


def _check_against_transformers(directory: Path) -> None:
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            decoded = ours.decode(ids, skip_special_tokens=special)
            assert decoded == theirs.decode(
                ids, skip_special_tokens=special, clean_up_tokenization_spaces=False
            )
    for messages in CONVERSATIONS:
        for prompted in (True, False):
            text = ours.apply_chat_template(messages, add_generation_prompt=prompted)
            assert text == theirs.apply_chat_template(
                messages, add_generation_prompt=prompted, tokenize=False
            )
            ids = theirs.apply_chat_template(
                messages, add_generation_prompt=prompted, return_dict=False
            )
            assert ours.encode(text, add_special_tokens=False) == ids


def test_ids_and_templates_equal_transformers(tokenizer_directory: Path) -> None:
    _check_against_transformers(tokenizer_directory)


@pytest.mark.slow
def test_the_built_in_model_equals_transformers(smollm2: Path) -> None:
    _check_against_transformers(smollm2)


def test_template_sees_extra_variables(byte_level_directory: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_directory)
    text = tokenizer.apply_chat_template(
        CONVERSATIONS[0], add_generation_prompt=False, variables={"extra": {"a": "<ü>"}}
    )
    assert text.endswith('<|im_end|>\n{"a": "<ü>"}')


def test_template_refusal_is_an_input_error(byte_level_directory: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_directory)
    with pytest.raises(InputError, match="unknown role tool") as caught:
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[7].content + 1 }}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_cannot_leave_its_sandbox_nor_crash(
    source: str, byte_level_directory: Path, copy_of: Callable[[Path], Path]
) -> None:
    directory = copy_of(byte_level_directory)
    (directory / "chat_template.jinja").write_text(source)
    tokenizer = Tokenizer.load(directory)
    with pytest.raises(InputError, match="refuses the messages"):
        tokenizer.apply_chat_template(CONVERSATIONS[0])


def test_named_templates_use_the_default_one(
    byte_level_directory: Path, copy_of: Callable[[Path], Path]
) -> None:
    directory = copy_of(byte_level_directory)
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer.load(directory).apply_chat_template(CONVERSATIONS[0]) == "yes"


def test_without_a_template_chat_is_refused(
    byte_level_directory: Path, copy_of: Callable[[Path], Path]
) -> None:
    directory = copy_of(byte_level_directory)
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer.load(directory).apply_chat_template(CONVERSATIONS[0])


def test_end_of_sequence_ids(byte_level_directory: Path, byte_fallback_directory: Path) -> None:
    assert Tokenizer.load(byte_fallback_directory).eos_token_ids == (2, 0)
    tokenizer = Tokenizer.load(byte_level_directory)
    (token_id,) = tokenizer.eos_token_ids
    assert tokenizer.token_bytes(token_id) == b"<|im_end|>"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_broken_file_is_named(
    name: str, content: str, byte_level_directory: Path, copy_of: Callable[[Path], Path]
) -> None:
    directory = copy_of(byte_level_directory)
    (directory / name).write_text(content)
    with pytest.raises(InputError, match=name):
        Tokenizer.load(directory)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_an_input_error() -> None:
    with pytest.raises(InputError, match="character 1"):
        Tokenizer.of_bytes().encode("a\ud800", add_special_tokens=False)


@given(st.text())
def test_byte_tokenizer_gives_bytes(text: str) -> None:
    tokenizer = BYTES
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_byte_tokenizer_names_the_other_ids() -> None:
    assert BYTES.vocab_size == 300
    assert BYTES.decode([104, 256, 299, 300], skip_special_tokens=True) == "h<256><299>"
    assert BYTES.apply_chat_template(CONVERSATIONS[0][:1]).endswith("there\nassistant: ")


def test_token_bytes_join_to_the_text(tokenizer_directory: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_directory)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert joined in (decoded, " " + decoded)


BYTES = Tokenizer.of_bytes(vocab_size=300)
