"""A recording as a trace: a line of JSON for each request, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

from sparsed.core import RecordedRequest


def write_recording(file: Path, requests: Iterable[RecordedRequest]) -> None:
    """Put the trace in the place of ``file``, readable by its owner alone; OSError leaves what was
    there. Lines are in the order of arrival."""
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    target = file.resolve()
    with NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.", delete=False) as new:
        try:
            new.writelines(f"{line_of(request)}\n" for request in ordered)
            new.flush()
            os.fsync(new.fileno())
            os.replace(new.name, target)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise


def line_of(request: RecordedRequest) -> str:
    """The fields of other public traces: milliseconds, tokens, and numbers of prefix blocks; and
    ``max_tokens``, the longest answer that was asked for."""
    return json.dumps(
        {
            "timestamp": round(1e3 * request.arrival_s, 3),
            "input_length": request.input_tokens,
            "output_length": request.output_tokens,
            "max_tokens": request.max_tokens,
            "hash_ids": list(request.block_ids),
        }
    )
