"""How many pages a hot tier misses, by page size, token budget and residency, as a small table.

Run from the root, over what ``record_selection.py`` wrote:
``PYTHONPATH=benchmarks python benchmarks/miss_curves.py RECORDING... --output FILE``.
``landscape.py`` reads the table. Caches are those of the device: buckets of age, equal lanes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from report import environment

from sparsed.core import PAGE_SIZES, CachePolicy, CacheStudy, InputError
from sparsed.engine.evaluate.recording import Recording, read_recording
from sparsed.engine.sim.study import simulate

TOKEN_BUDGETS: Final = (256, 384, 512, 768, 1024, 1536, 2048, 3072)
RESIDENCIES: Final = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
DIGITS: Final = 5


def miss_row(
    recordings: Sequence[Recording], *, page_size: int, token_budget: int
) -> dict[str, object] | None:
    """``miss_frac``: loads on demand over selected pages, one number a residency; None for a
    selection too small to hold the pages that are always read."""
    study = CacheStudy(
        page_size=page_size,
        token_budget=token_budget,
        policies=(CachePolicy.BUCKETED,),
        residencies=RESIDENCIES,
    )
    try:
        report = simulate(recordings, study, on_progress=lambda phase, frac: None)
    except InputError as error:
        print(f"page size {page_size}, budget {token_budget}: {error}")
        return None
    return {
        "page_size": page_size,
        "token_budget": token_budget,
        "miss_frac": [round(row.miss_frac, DIGITS) for row in report.rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recordings", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    recordings = [read_recording(path) for path in options.recordings]
    rows = []
    for page_size in PAGE_SIZES:
        for token_budget in TOKEN_BUDGETS:
            row = miss_row(recordings, page_size=page_size, token_budget=token_budget)
            if row is not None:
                print(row, flush=True)
                rows.append(row)
    result = environment() | {
        "command": "python benchmarks/miss_curves.py RECORDINGS --output miss-curves.json",
        "recordings": [asdict(recording.header) for recording in recordings],
        "num_steps": [len(recording.ranked_SLR) for recording in recordings],
        "residencies": RESIDENCIES,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
