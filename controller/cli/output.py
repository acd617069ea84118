"""How verbs print: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparsed.core import KnobValue


class Output(StrEnum):
    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[
    Output, typer.Option("--format", "-o", help="text for people, json for programs.")
]
OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="text for people, json for programs.")
]


def print_json(value: Any) -> None:
    """A dataclass, or a sequence of them, under the field names of the vocabulary."""
    print(to_json(value))


def to_json(value: Any) -> str:
    """As ``print_json`` prints it."""
    return json.dumps(value, default=_plain, indent=2)


def print_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def complain(message: str) -> None:
    print(f"sparsed: {message}", file=sys.stderr)


def gib(size_bytes: float) -> str:
    """A size in words: below a tenth of a GiB in MiB."""
    mib = size_bytes / (1 << 20)
    return f"{mib:.2f} MiB" if 0 < mib < 102.4 else f"{mib / 1024:.2f} GiB"


def values_in_words(values: Mapping[str, KnobValue]) -> str:
    """As the command line writes them."""
    pairs = values.items()
    return ", ".join(f"{name}={'auto' if value is None else value}" for name, value in pairs)


def utc(at: float) -> str:
    """Seconds since the epoch as a date."""
    return datetime.fromtimestamp(at, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else dict(value)
