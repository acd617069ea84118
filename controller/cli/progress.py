"""Progress of a long step on stderr: a line that moves on a terminal, few lines elsewhere."""

from __future__ import annotations

import sys


class ProgressLine:
    """Call it with a phase in words and the part of it that is done, in [0, 1]."""

    def __init__(self) -> None:
        self._shown: tuple[str, int] | None = None

    def __call__(self, phase: str, frac: float) -> None:
        is_terminal = sys.stderr.isatty()
        step = 1 if is_terminal else 25
        now = (phase, int(100 * frac) // step * step)
        if now == self._shown:
            return
        self._shown = now
        start, end = ("\r", "" if frac < 1 else "\n") if is_terminal else ("", "\n")
        print(f"{start}{phase} {now[1]} %", end=end, file=sys.stderr, flush=True)
