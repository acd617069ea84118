"""Progress of a long step on stderr: a line that moves on a terminal, few lines elsewhere."""

from __future__ import annotations

import sys
from typing import Final

_LINE_START: Final = "\r\x1b[K"  # and erases what a longer phase left behind


class ProgressLine:
    """Call it with a phase in words and the part of it that is done, in [0, 1]; 0 is not told, for
    not every phase knows. ``only_terminal``: where nobody looks on, say nothing."""

    def __init__(self, *, only_terminal: bool = False) -> None:
        self._only_terminal = only_terminal
        self._shown: tuple[str, int] | None = None

    def __call__(self, phase: str, frac: float) -> None:
        is_terminal = sys.stderr.isatty()
        step = 1 if is_terminal else 25
        now = (phase, int(100 * frac) // step * step)
        if now == self._shown or (self._only_terminal and not is_terminal):
            return
        self._shown = now
        start, end = (_LINE_START, "" if frac < 1 else "\n") if is_terminal else ("", "\n")
        part = f" {now[1]} %" if now[1] else ""
        print(f"{start}{phase}{part}", end=end, file=sys.stderr, flush=True)
