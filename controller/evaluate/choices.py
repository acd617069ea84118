"""Choices as an operator writes them: ``method[:key=value,...]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final, NamedTuple, TypeVar

from sparsed.core import (
    MEAN_KEY,
    BudgetRule,
    Choice,
    GroupRule,
    InputError,
    MetadataFormat,
    RankMethod,
    SparseMethod,
)

Name = TypeVar("Name", bound=StrEnum)

FORM: Final = "METHOD[:KEY=VALUE,...]"
_MAX_DIGITS: Final = 9

_OF_PAGES: Final = frozenset(
    ("share", "page_size", "budgets", "dense_layers", "estimated", "sink_pages", "recent_pages")
)
_OF_SUMMARIES: Final = _OF_PAGES | {"grain", "group_rule", "metadata", "super_pages", "coarse"}
_OF_KEYS: Final = _OF_SUMMARIES | {"kept_dims"}
TAKES: Final[Mapping[RankMethod, frozenset[str]]] = {  # the keys that change what a method does
    RankMethod.DENSE: frozenset(),
    RankMethod.ORACLE: _OF_PAGES | {"group_rule"},
    RankMethod.RANDOM: _OF_PAGES,
    RankMethod.CUBOID_MEAN: _OF_KEYS,
    RankMethod.QUEST: _OF_KEYS,
    RankMethod.MEAN: _OF_KEYS,
    RankMethod.MEAN_SPREAD: _OF_KEYS,
    RankMethod.VARIANCE: _OF_KEYS | {"variance_weight"},
    RankMethod.EVERY_KEY: _OF_KEYS,
    RankMethod.CLUSTERS: frozenset(("share", "metadata", "dense_layers", "estimated")),
    RankMethod.GATE: _OF_SUMMARIES,
}


class GivenChoice(NamedTuple):
    """A choice, and whether its share was given with it."""

    choice: Choice
    has_share: bool


def parse_choice(text: str) -> GivenChoice:
    """Read ``cuboid-mean``, ``mean:page_size=16,share=1/16``, or ``mean-key``, the default of an
    engine. InputError naming the key, the value and what is allowed."""
    head, colon, rest = text.partition(":")
    plain = _plain(head.strip(), text=text)
    values: dict[str, object] = {}
    for pair in rest.split(",") if colon else ():
        key, value = _split(pair, text=text)
        if key in values:
            raise _wrong(text, f"{key} is given twice", key=key)
        _check_taken(key, plain.method, text=text)
        values[key] = _PARSERS[key](value, key, text)
    try:
        choice = replace(plain, **values)  # type: ignore[arg-type]  # made by _PARSERS
    except InputError as error:
        raise _wrong(text, str(error), key=error.field or "choice") from None
    if "coarse" in values and not choice.super_pages:
        words = "coarse does nothing without super_pages; give super_pages=16, or leave coarse out"
        raise _wrong(text, words, key="coarse")
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


def _plain(name: str, *, text: str) -> Choice:
    """What a name alone stands for."""
    if name == SparseMethod.MEAN_KEY:
        return MEAN_KEY
    if name not in tuple(RankMethod):
        allowed = ", ".join((*RankMethod, SparseMethod.MEAN_KEY))
        raise _wrong(text, f"method={name}: allowed: one of {allowed}", key="method")
    return Choice(method=RankMethod(name))


def _check_taken(key: str, method: RankMethod, *, text: str) -> None:
    if key not in TAKES[method]:
        takers = ", ".join(other for other in RankMethod if key in TAKES[other])
        words = f"{method} takes no {key}; leave it out, or take one that does: {takers}"
        raise _wrong(text, words, key=key)


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
