"""What ``sparsed bench decode`` and ``kernels`` have in common: their options and their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from sparsed.controller.cli.flags import KNOB_FLAGS, MODEL_FLAGS, SERVING_FLAGS, Flag
from sparsed.controller.cli.output import to_json
from sparsed.core import KNOBS_BY_NAME, InputError, SparseMethod

MAX_BATCH: Final = int(KNOBS_BY_NAME["max_num_seqs"].maximum or 0)
MAX_CONTEXT: Final = int(KNOBS_BY_NAME["max_model_len"].maximum or 0)
MODEL_HELP: Final = "A directory, a .gguf file, a hub id, a built-in name or dummy:SHAPE"

BatchesOption = Annotated[
    str,
    typer.Option(
        metavar="N,N", help="Requests at once. Default: 1, 8, 32 and 64, on a CPU 1 and 4."
    ),
]
ContextsOption = Annotated[
    str,
    typer.Option(
        metavar="TOKENS,TOKENS",
        help="Tokens of each request. Default: 2048, 8192 and 32768, on a CPU 512 and 2048.",
    ),
]
FileOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Write the results here too, as JSON."),
]


def choose_flags(*names: str, **defaults: str) -> tuple[Flag, ...]:
    """Flags of ``sparsed start`` by name; ``defaults`` replaces what the help says of theirs."""
    flags = {flag.name: flag for flag in (*MODEL_FLAGS, *SERVING_FLAGS, *KNOB_FLAGS)}
    flags["model"] = replace(flags["model"], help=MODEL_HELP)
    return tuple(
        replace(flags[name], default=defaults.get(name, flags[name].default)) for name in names
    )


PLACE_FLAGS: Final = ("model", "state_dir", "device", "dtype")
DECODE_FLAGS: Final = choose_flags(
    *PLACE_FLAGS,
    "sparse_method",
    "token_budget",
    "page_size",
    "prefill_chunk",
    "kv_hbm_gib",
    "kv_dram_gib",
    "enforce_eager",
    "selection_trace",
    sparse_method=SparseMethod.DENSE.value,
    kv_dram_gib="what the largest measurement needs",
)
KERNELS_FLAGS: Final = choose_flags(
    *PLACE_FLAGS, "page_size", model="dummy:llama-3.1-8b", page_size="32"
)


def parse_counts(text: str, *, name: str, maximum: int) -> tuple[int, ...]:
    """Whole numbers with commas between them, each once; InputError naming the option."""
    counts = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        count = int(part) if part.isdecimal() and len(part) < 10 else 0
        if not 1 <= count <= maximum:
            raise InputError(
                f"--{name} {part!r}: allowed are whole numbers from 1 to {maximum}, with commas "
                "between them",
                field=name,
            )
        counts.append(count)
    return tuple(dict.fromkeys(counts))


def write_file(file: Path | None, report: Any) -> None:
    if file is None:
        return
    try:
        file.write_text(to_json(report) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {file}: {error.strerror}", field="output") from None
