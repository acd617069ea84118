"""How far the predictions of ``tuner/roofline.py`` are from what was measured on one H100.

Run from the root: ``PYTHONPATH=benchmarks python benchmarks/model_error.py``; it needs no GPU and
takes a second. It reads the committed results of decode steps, loads and the link, prints every
row beside its prediction, then fits the constants of the engine to the steps again, once with all
of them and once without each of the runs, whose rows it then predicts: the first error is of what
the constants were chosen by, the second is not.

Misses of a row are those it measured. What the engine would have expected of them before any
request ran is told besides, for a plan has nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from report import environment

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
    prompt_flop,
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


def fit(steps: Sequence[Step], *, prompt_frac: float) -> EngineCosts:
    """Constants with the least squares of relative errors: a step is linear in their inverses."""
    terms = np.array(
        [
            (
                step.load.weights_bytes / H100.copy_bytes_per_s,
                (step.load.kv_bytes + step.load.summary_bytes) / H100.copy_bytes_per_s,
                SHAPE.num_layers * step.load.requests,
                SHAPE.num_layers * step.load.selects,
            )
            for step in steps
        ]
    )
    measured = np.array([step.measured_ms / 1e3 for step in steps])
    loads = np.array([step.load.link_bytes / H100.link_bytes_per_s for step in steps])
    found, *_ = np.linalg.lstsq(
        terms / measured[:, None], (measured - loads) / measured, rcond=None
    )
    return EngineCosts(
        product_frac=float(1 / found[0]),
        kv_frac=float(1 / found[1]),
        prompt_frac=prompt_frac,
        request_layer_s=float(found[2]),
        select_layer_s=float(found[3]),
    )


def fit_prompt_frac() -> float:
    """Of the rate of large products, by the prompt of 32,768 tokens."""
    ttft_s = read("h100-dense-cold.json")["loads"][0]["mean_ttft_s"]
    return prompt_flop(SHAPE, 32768) / H100.matmul_flop_per_s / float(ttft_s)


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


def held_out(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Predicted over measured of the rows of each run, with constants fitted to the others."""
    ratios: dict[str, list[float]] = {}
    for run in dict.fromkeys(step.run for step in steps):
        others = [step for step in steps if step.run != run]
        costs = fit(others, prompt_frac=ENGINE_COSTS.prompt_frac)
        ratios[run] = [
            step.predict_ms(costs) / step.measured_ms for step in steps if step.run == run
        ]
    return ratios


def expected_ms(step: Step) -> float:
    """With the misses that the engine expects before it has seen any."""
    selected = step.load.kv_bytes * (1 - PAGE_SIZE / BUDGET)  # but for the partial page
    load = replace(step.load, link_bytes=step.expected_frac * selected)
    return step_time(load, SHAPE, H100).step_s * 1e3


def summarise(ratios: Sequence[float]) -> dict[str, float]:
    errors = np.abs(np.array(ratios) - 1)
    return {
        "rows": len(ratios),
        "mean_abs_error": float(errors.mean()),
        "max_abs_error": float(errors.max()),
        "least_ratio": min(ratios),
        "most_ratio": max(ratios),
    }


def tell(summary: dict[str, float]) -> str:
    return (
        f"{summary['rows']:.0f} rows, mean error {summary['mean_abs_error']:.1%}, worst "
        f"{summary['max_abs_error']:.1%}, predicted / measured {summary['least_ratio']:.3f} to "
        f"{summary['most_ratio']:.3f}"
    )


def row_of(step: Step) -> dict[str, Any]:
    predicted = step.predict_ms()
    told: dict[str, Any] = {
        "run": step.run,
        "case": step.case,
        "predicted_ms": predicted,
        "measured_ms": step.measured_ms,
        "ratio": predicted / step.measured_ms,
    }
    if step.load.selects:
        told["miss_frac"] = step.miss_frac
        told["expected_miss_frac"] = step.expected_frac
        told["predicted_with_expected_misses_ms"] = expected_ms(step)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    steps = [*dense_steps(), *residency_steps(look_ahead=False)]
    ahead = residency_steps(look_ahead=True)
    print("decode step, ms: predicted, measured, ratio")
    for step in (*steps, *ahead):
        row = row_of(step)
        print(
            f"{row['predicted_ms']:8.2f} {row['measured_ms']:8.2f} {row['ratio']:6.3f}  "
            f"{row['run']}: {row['case']}"
        )
    others = figures()
    print("\nother figures: predicted, measured, ratio")
    for figure in others:
        ratio = figure.predicted / figure.measured
        print(
            f"{figure.predicted:8.2f} {figure.measured:8.2f} {ratio:6.3f}  {figure.source}: "
            f"{figure.what}{' (fitted)' if figure.fitted else ''}"
        )
    apart = held_out(steps)
    with_curve = [expected_ms(step) / step.measured_ms for step in steps if step.miss_frac > 0]
    summaries = {
        "steps, constants fitted to them": summarise(
            [step.predict_ms() / step.measured_ms for step in steps]
        ),
        "steps, constants fitted to the other runs": summarise(
            [ratio for ratios in apart.values() for ratio in ratios]
        ),
        "steps with look-ahead, which is not modelled": summarise(
            [step.predict_ms() / step.measured_ms for step in ahead]
        ),
        "steps that missed, with misses as expected before any": summarise(with_curve),
        "other figures that nothing was fitted to": summarise(
            [item.predicted / item.measured for item in others if not item.fitted]
        ),
    }
    refitted = fit(steps, prompt_frac=fit_prompt_frac())
    print()
    for name, summary in summaries.items():
        print(f"{name}: {tell(summary)}")
    print(f"\nconstants in use {ENGINE_COSTS}\nfitted now       {refitted}")
    if options.output:
        result = environment() | {
            "gpu": asdict(H100),
            "constants": asdict(ENGINE_COSTS),
            "fitted_now": asdict(refitted),
            "summaries": summaries,
            "steps": [row_of(step) for step in (*steps, *ahead)],
            "held_out": apart,
            "figures": [asdict(item) for item in others],
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
