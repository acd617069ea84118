"""How much of the way from the engine's own ranking to the best one another ranking goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log
from typing import Final

from sparsed.core import Choice, Quality, RankMethod

REFERENCE_PAGE_SIZE: Final = 32


def gap_closed(row: Quality, rows: Sequence[Quality]) -> float | None:
    """(cuboid-mean - row) / (cuboid-mean - oracle) in logarithms of the ratio to dense attention,
    at the text and share of the row: 0 is as cuboid-mean, 1 as the oracle.

    Both ends are of pages of 32 tokens where ``rows`` has both, else of the row's page size; the
    oracle is the better one where several group rules ran. None without both, or where the oracle
    is not better than cuboid-mean, and for dense attention.
    """
    if row.choice.method is RankMethod.DENSE:
        return None
    for page_size in (REFERENCE_PAGE_SIZE, row.choice.page_size):
        plain = Choice(method=RankMethod.CUBOID_MEAN, share=row.choice.share, page_size=page_size)
        start = _least(rows, text=row.text, plain=plain)
        end = _least(rows, text=row.text, plain=replace(plain, method=RankMethod.ORACLE))
        if start is not None and end is not None:
            whole = log(start / end)
            return log(start / row.ratio) / whole if whole > 0 else None
    return None


def _least(rows: Sequence[Quality], *, text: str, plain: Choice) -> float | None:
    """The ratio of a choice on a text, of the oracle by any group rule."""
    ratios = [
        row.ratio for row in rows if row.text == text and _any_rule_of_oracle(row.choice) == plain
    ]
    return min(ratios, default=None)


def _any_rule_of_oracle(choice: Choice) -> Choice:
    if choice.method is not RankMethod.ORACLE:
        return choice
    return replace(choice, group_rule=Choice(method=RankMethod.ORACLE).group_rule)
