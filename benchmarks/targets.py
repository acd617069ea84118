"""Bounds on figures of a benchmark: how they are told, and how they are kept beside the figures."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SIGNS = {operator.le: "<=", operator.lt: "<", operator.ge: ">="}


class Target(NamedTuple):
    """A bound on a figure. ``value`` None: it was not measured."""

    words: str
    value: float | None
    meets: Callable[[float, float], bool]
    bound: float


def print_targets(targets: Sequence[Target]) -> None:
    print()
    for words, value, meets, bound in targets:
        sign = SIGNS[meets]
        word = "-   " if value is None else "ok  " if meets(value, bound) else "MISS"
        shown = "not measured" if value is None else f"{value:.4g}"
        print(f"{word} {words}: {shown} ({sign} {bound:g})")


def write_result(path: Path, result: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """The result and its targets as JSON."""
    told = [{"words": t.words, "value": t.value, "bound": t.bound} for t in targets]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "targets": told}, indent=2) + "\n")
