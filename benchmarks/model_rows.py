"""The committed measurements of one H100, each beside what it moves and what is predicted of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from sparsed.controller.plan.gpus import GPUS
from sparsed.core import (
    DTYPE_BYTES,
    GIB,
    CopyPath,
    Direction,
    LinkCalibration,
    LinkEntry,
    LinkKey,
    LinkProbe,
    SparseMethod,
)
from sparsed.engine.hit_curve import Learned
from sparsed.engine.kvcache.geometry import Geometry, num_frames
from sparsed.engine.kvcache.link_policy import choose_copy
from sparsed.engine.measure.points import weights_read_bytes
from sparsed.engine.models.dummy import dummy_config
from sparsed.tuner.queueing import Job, all_at_once
from sparsed.tuner.roofline import (
    ENGINE_COSTS,
    EngineCosts,
    StepLoad,
    prompt_time_s,
    step_time,
)

RESULTS: Final = Path(__file__).resolve().parent / "results"
SHAPE: Final = dummy_config("dummy:llama-3.1-8b").shape
DTYPE: Final = "bfloat16"
BUDGET, PAGE_SIZE = 2048, 8  # of the sparse rows
H100: Final = GPUS["h100"].rates
GEOMETRY: Final = Geometry.of(SHAPE, dtype=DTYPE, page_size=PAGE_SIZE)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A measured decode step. ``run`` names the file and the process it is of; ``expected_frac``:
    misses that the engine's first hit curve gives, beside those measured."""

    run: str
    case: str
    load: StepLoad
    measured_ms: float
    miss_frac: float
    expected_frac: float

    def predict_ms(self, costs: EngineCosts = ENGINE_COSTS) -> float:
        return step_time(self.load, SHAPE, H100, costs=costs).step_s * 1e3


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Anything else that was measured. ``fitted``: a constant was chosen by it."""

    source: str
    what: str
    measured: float
    predicted: float
    fitted: bool = False


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def dense_load(requests: int, kv_tokens: int) -> StepLoad:
    return StepLoad(
        requests=requests,
        weights_bytes=weights_read_bytes(SHAPE, dtype=DTYPE),
        element_bytes=DTYPE_BYTES[DTYPE],
        kv_bytes=float(kv_tokens * SHAPE.kv_bytes_per_token(DTYPE)),
    )


def sparse_load(requests: int, context: int, *, link_bytes: float) -> StepLoad:
    per_frame = GEOMETRY.summary_bytes_per_frame(SparseMethod.MEAN_KEY)
    return replace(
        dense_load(requests, requests * min(BUDGET, context)),
        summary_bytes=float(requests * num_frames(context) * per_frame),
        link_bytes=link_bytes,
        selects=True,
    )


def dense_steps() -> list[Step]:
    return [
        Step(
            run="h100-dense.json",
            case=f"{row['requests']} x {row['tokens']} dense",
            load=dense_load(row["requests"], row["requests"] * row["tokens"]),
            measured_ms=row["step_ms"],
            miss_frac=0.0,
            expected_frac=0.0,
        )
        for row in read("h100-dense.json")["steps"]
    ]


def residency_steps(*, look_ahead: bool) -> list[Step]:
    """Every row of the runs over two tiers, with look-ahead or without."""
    return [
        _residency_step(name, row)
        for name, run in read("h100-residency.json")["runs"].items()
        for row in run["rows"]
        if row["looks_ahead"] == look_ahead
    ]


def _residency_step(run: str, row: dict[str, Any]) -> Step:
    requests, context = row["requests"], row["context_tokens"]
    selects = row["selections"] in ("replayed", "scored")
    load = dense_load(requests, requests * context)
    if selects:
        load = sparse_load(requests, context, link_bytes=float(row["link_bytes"]))
    ratio = row["resident_ratio"]
    expected = Learned().curve(slots=ratio, selected=1.0, total=context / BUDGET).at(ratio)
    return Step(
        run=f"h100-residency.json, {run}",
        case=f"{requests} x {context} {row['selections']} {row['resident_ratio']:.2f}x"
        + (", look-ahead" if row["looks_ahead"] else ""),
        load=load,
        measured_ms=row["step_ms"],
        miss_frac=row["miss_frac"],
        expected_frac=expected if selects else 0.0,
    )


def figures() -> list[Figure]:
    """Prompts, loads, the link: what is not one decode step."""
    dense, cold = read("h100-dense.json"), read("h100-dense-cold.json")["loads"][0]
    alone_s = prompt_time_s(SHAPE, H100, num_tokens=32768)
    step = step_time(dense_load(1, 32768 + 32), SHAPE, H100).step_s
    saves = float(np.median(dense["saves"]["ttft_with_s"]))
    found = [
        Figure(
            source="h100-dense-cold.json",
            what="prompt of 32,768 alone: first token, s",
            measured=cold["mean_ttft_s"],
            predicted=alone_s,
            fitted=True,
        ),
        Figure(
            source="h100-dense-cold.json",
            what="prompt of 32,768 alone: TPOT, ms",
            measured=cold["mean_tpot_ms"],
            predicted=step * 1e3,
        ),
        Figure(
            source="h100-dense.json",
            what="prompt of 32,768 with saves: first token, s",
            measured=saves,
            predicted=alone_s,
        ),
    ]
    for load in dense["loads"][1:]:
        found += _load_figures("h100-dense.json", load, dense["knobs"])
    served = read("h100-serve.json")["summary"]
    short = {
        **dense["loads"][1],
        "total_s": served["duration_s"],
        "mean_ttft_s": served["ttft"]["mean_ms"] / 1e3,
        "mean_tpot_ms": served["tpot"]["mean_ms"],
    }
    found += _load_figures("h100-serve.json, through the server", short, dense["knobs"])
    return [*found, _link_figure()]


def _load_figures(source: str, load: dict[str, Any], knobs: dict[str, Any]) -> list[Figure]:
    """Requests that arrive together, all dense: as many run as the hot tier holds whole."""
    prompt, output, count = load["prompt_tokens"], load["output_tokens"], load["count"]
    tier_tokens = knobs["kv_hbm_gib"] * GIB / SHAPE.kv_bytes_per_token(DTYPE)
    at_once = min(count, int(tier_tokens / (num_frames(prompt + output) * 128)))
    job = Job(
        prompt_s=prompt_time_s(SHAPE, H100, num_tokens=prompt),
        chunks=prompt / knobs["prefill_chunk"],
        output_tokens=output,
    )
    middle = dense_load(at_once, at_once * (prompt + output // 2))
    burst = all_at_once(
        job, count=count, at_once=at_once, step_s=step_time(middle, SHAPE, H100).step_s
    )
    case = f"{count} x ({prompt:,} + {output}) at once"
    return [
        Figure(source=source, what=f"{case}: {what}", measured=measured, predicted=predicted)
        for what, measured, predicted in (
            ("total, s", load["total_s"], burst.total_s),
            (
                "output tokens/s",
                count * output / load["total_s"],
                count * output / burst.total_s,
            ),
            ("mean TTFT, s", load["mean_ttft_s"], burst.mean_ttft_s),
            ("mean TPOT, ms", load["mean_tpot_ms"], burst.mean_tpot_s * 1e3),
        )
    ]


def _link_figure() -> Figure:
    stored = read("h100-link.json")["calibration"]
    calibration = LinkCalibration(
        key=LinkKey(**stored["key"]),
        contiguous=LinkProbe(**stored["contiguous"]),
        entries=tuple(
            LinkEntry(
                **{
                    **entry,
                    "direction": Direction(entry["direction"]),
                    "path": CopyPath(entry["path"]),
                }
            )
            for entry in stored["entries"]
        ),
    )
    chosen = choose_copy(
        calibration,
        direction=Direction.H2D,
        piece_bytes=GEOMETRY.page_bytes,
        paths=(CopyPath.KERNEL,),
    )
    assert chosen is not None
    return Figure(
        source="h100-link.json",
        what="pages of 4 KiB as the engine loads them, GB/s",
        measured=chosen.bytes_per_s / 1e9,
        predicted=H100.link_bytes_per_s / 1e9,
        fitted=True,
    )
