"""How long prompts and outputs are: fixed, uniform, or lognormal."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final, TypeVar

from sparsed.core import InputError

FORMS: Final = "N, LOW:HIGH or lognormal:MEDIAN:SIGMA"
MAX_TOKENS: Final = 1 << 24
MAX_SIGMA: Final = 4.0  # of the logarithm: beyond it one length in a hundred is 10,000 medians

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True, slots=True)
class UniformLengths:
    """Whole numbers of tokens from ``low`` to ``high``, both included."""

    low: int
    high: int

    def draw(self, generator: random.Random) -> int:
        return generator.randint(self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class LognormalLengths:
    """Many short ones and a long tail; ``sigma`` is the deviation of the natural logarithm."""

    median: float
    sigma: float

    def draw(self, generator: random.Random) -> int:
        length = self.median * math.exp(self.sigma * generator.gauss(0.0, 1.0))
        return min(max(1, round(length)), MAX_TOKENS)


Lengths = UniformLengths | LognormalLengths


def parse_lengths(text: str, *, field: str) -> Lengths:
    """The lengths that ``text`` asks for, in one of ``FORMS``; InputError naming ``field``."""
    try:
        return _parse(text.strip())
    except ValueError as error:
        raise InputError(
            f"--{field} {text!r}: {error}; give {FORMS}, in tokens", field=field
        ) from None


def _parse(text: str) -> Lengths:
    kind, *numbers = text.split(":")
    if kind == "lognormal":
        if len(numbers) != 2:
            raise ValueError("lognormal takes a median and a sigma")
        return _lognormal(*(_number(number, float) for number in numbers))
    low, high = _number(kind, int), _number(numbers[0] if numbers else kind, int)
    if len(numbers) > 1 or not 1 <= low <= high <= MAX_TOKENS:
        raise ValueError(f"1 <= LOW <= HIGH <= {MAX_TOKENS} must hold")
    return UniformLengths(low=low, high=high)


def _number(text: str, kind: type[Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise ValueError(f"{text!r} is not a {what}") from None


def _lognormal(median: float, sigma: float) -> LognormalLengths:
    if not (1 <= median <= MAX_TOKENS and 0 <= sigma <= MAX_SIGMA):
        raise ValueError(f"the median must be 1 to {MAX_TOKENS}, sigma 0 to {MAX_SIGMA:g}")
    return LognormalLengths(median=median, sigma=sigma)
