"""Choices as an operator writes them: ``method[:key=value,...]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from enum import StrEnum
from fractions import Fraction
from typing import Final, NamedTuple, TypeVar

from sparsed.core import BudgetRule, Choice, GroupRule, InputError, MetadataFormat, RankMethod

Name = TypeVar("Name", bound=StrEnum)

FORM: Final = "METHOD[:KEY=VALUE,...]"
MAX_DENOMINATOR: Final = 4096
_MAX_DIGITS: Final = 9


class GivenChoice(NamedTuple):
    """A choice, and whether its share was given with it."""

    choice: Choice
    has_share: bool


def parse_choice(text: str) -> GivenChoice:
    """Read ``cuboid-mean`` or ``mean:page_size=16,share=1/16``. InputError naming the key, the
    value and what is allowed."""
    head, colon, rest = text.partition(":")
    method = _one_of(RankMethod, head.strip(), key="method", text=text)
    values: dict[str, object] = {}
    for pair in rest.split(",") if colon else ():
        key, value = _split(pair, text=text)
        if key in values:
            raise _wrong(text, f"{key} is given twice", key=key)
        values[key] = _PARSERS[key](value, key, text)
    try:
        choice = Choice(method=method, **values)  # type: ignore[arg-type]  # made by _PARSERS
    except InputError as error:
        raise _wrong(text, str(error), key=error.field or "choice") from None
    return GivenChoice(choice, "share" in values)


def parse_share(text: str) -> float:
    """A share as a fraction (``1/16``) or a number; InputError unless more than 0, at most 1."""
    share = _fraction(text)
    if share is None or not 0 < share <= 1:
        raise InputError(
            f"--share {text!r}: allowed are shares of more than 0 and at most 1, as 1/16 or 0.0625",
            field="share",
        )
    return share


def cross(choices: Iterable[GivenChoice], shares: Sequence[float]) -> tuple[Choice, ...]:
    """Every choice at its own share, or else at each of ``shares``. Dense attention, which any
    evaluation holds the others against, is left out."""
    crossed = [
        replace(choice, share=share)
        for choice, has_share in choices
        if choice.method is not RankMethod.DENSE
        for share in ((choice.share,) if has_share else shares)
    ]
    return tuple(dict.fromkeys(crossed))


def format_choice(choice: Choice, *, share: bool = True) -> str:
    """What ``parse_choice`` reads as the same choice; ``share`` False leaves that out."""
    changed = [
        f"{item.name}={_format(item.name, getattr(choice, item.name))}"
        for item in fields(choice)
        if item.name not in ("method", "share") and getattr(choice, item.name) != item.default
    ]
    shares = [f"share={format_share(choice.share)}"] if share else []
    rest = ",".join([*shares, *changed])
    return f"{choice.method}:{rest}" if rest else str(choice.method)


def format_share(share: float) -> str:
    """As a fraction where one with a small denominator is exactly it."""
    near = Fraction(share).limit_denominator(MAX_DENOMINATOR)
    return str(near) if near.numerator / near.denominator == share else repr(share)


def _format(name: str, value: object) -> str:
    return format_share(value) if name == "estimated" and isinstance(value, float) else str(value)


def _split(pair: str, *, text: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in pair.partition("="))
    if key not in _PARSERS:
        raise _wrong(text, f"unknown key {key!r}; allowed: {', '.join(_PARSERS)}", key="choice")
    if not equals or not value:
        raise _wrong(text, f"{key} has no value; give {key}=VALUE", key=key)
    return key, value


def _one_of(names: type[Name], value: str, *, key: str, text: str) -> Name:
    try:
        return names(value)
    except ValueError:
        allowed = ", ".join(names)
        raise _wrong(text, f"{key}={value}: allowed: one of {allowed}", key=key) from None


def _named(names: type[StrEnum]) -> Callable[[str, str, str], object]:
    return lambda value, key, text: _one_of(names, value, key=key, text=text)


def _whole(value: str, key: str, text: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) <= _MAX_DIGITS):
        raise _wrong(text, f"{key}={value}: allowed: whole numbers from 0", key=key)
    return int(value)


def _number(value: str, key: str, text: str) -> float:
    found = _fraction(value)
    if found is None:
        raise _wrong(text, f"{key}={value}: allowed: numbers, or fractions as 1/16", key=key)
    return found


def _fraction(text: str) -> float | None:
    """The number that ``text`` is; None if it is none or no finite one."""
    upper, slash, lower = text.partition("/")
    try:
        number = float(upper) / (float(lower) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        return None
    return number if abs(number) < float("inf") else None


def _wrong(text: str, words: str, *, key: str) -> InputError:
    return InputError(f"--choice {text!r}: {words}", field=key)


_PARSERS: Final[Mapping[str, Callable[[str, str, str], object]]] = {
    "share": _number,
    "page_size": _whole,
    "grain": _whole,
    "group_rule": _named(GroupRule),
    "metadata": _named(MetadataFormat),
    "kept_dims": _whole,
    "variance_weight": _number,
    "budgets": _named(BudgetRule),
    "dense_layers": _whole,
    "super_pages": _whole,
    "coarse": _number,
    "estimated": _number,
    "sink_pages": _whole,
    "recent_pages": _whole,
}
