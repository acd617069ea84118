"""Which request kills the engine: suspects run one at a time, and only a death alone convicts.

====== =========== ==============================================================
deaths             in the engine it runs
====== =========== ==============================================================
0, 1   free        beside all others: an engine may die once by chance
2      suspect     with no other suspect; free ones run on
3      accused     alone
====== =========== ==============================================================

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SUSPECT_DEATHS = 2
ACQUITTAL_TOKENS = 16  # drawn by a suspect since the last death: it is past what killed


@dataclass(kw_only=True, slots=True)
class Record:
    """Engine deaths while one request ran, and the tokens it has drawn since the last one."""

    deaths: int = 0
    num_tokens_since: int = 0

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= SUSPECT_DEATHS

    def note_death(self, *, alone: bool) -> bool:
        """An engine died with this request in it; True if nobody else can have killed it."""
        self.deaths += 1
        self.num_tokens_since = 0
        return alone and self.is_suspect

    def note_token(self) -> None:
        """A token was drawn; enough of them end a suspicion."""
        self.num_tokens_since += 1
        if self.is_suspect and self.num_tokens_since >= ACQUITTAL_TOKENS:
            self.deaths = 0


def may_run(records: Sequence[Record], *, num_active: int) -> list[int]:
    """Which of ``records`` may be in the engine now, in the order in which to send them.

    Free ones leave one of ``num_active`` places to the suspect, which must not wait for its turn.
    """
    suspects = [index for index, record in enumerate(records) if record.is_suspect]
    free = [index for index, record in enumerate(records) if not record.is_suspect]
    accused = [index for index in suspects if records[index].deaths > SUSPECT_DEATHS]
    if accused:
        return accused[:1]
    return suspects[:1] + free[: num_active - 1] if suspects else free
