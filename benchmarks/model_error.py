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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from model_rows import (
    BUDGET,
    H100,
    PAGE_SIZE,
    SHAPE,
    Step,
    dense_steps,
    figures,
    read,
    residency_steps,
)
from report import environment

from sparsed.tuner.roofline import (
    ENGINE_COSTS,
    EngineCosts,
    prompt_flop,
    step_time,
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


def summaries(steps: Sequence[Step], ahead: Sequence[Step]) -> dict[str, dict[str, float]]:
    apart = held_out(steps)
    others = [item for item in figures() if not item.fitted]
    return {
        "steps, constants fitted to them": summarise(ratios(steps)),
        "steps, constants fitted to the other runs": summarise(
            [ratio for found in apart.values() for ratio in found]
        ),
        "steps with look-ahead, which is not modelled": summarise(ratios(ahead)),
        "steps that missed, with misses as expected before any": summarise(
            [expected_ms(step) / step.measured_ms for step in steps if step.miss_frac > 0]
        ),
        "other figures that nothing was fitted to": summarise(
            [item.predicted / item.measured for item in others]
        ),
    }


def ratios(steps: Sequence[Step]) -> list[float]:
    """Predicted over measured."""
    return [step.predict_ms() / step.measured_ms for step in steps]


def print_rows(steps: Sequence[Step]) -> None:
    print("decode step, ms: predicted, measured, ratio")
    for step in steps:
        row = row_of(step)
        print(
            f"{row['predicted_ms']:8.2f} {row['measured_ms']:8.2f} {row['ratio']:6.3f}  "
            f"{row['run']}: {row['case']}"
        )
    print("\nother figures: predicted, measured, ratio")
    for item in figures():
        print(
            f"{item.predicted:8.2f} {item.measured:8.2f} {item.predicted / item.measured:6.3f}  "
            f"{item.source}: {item.what}{' (fitted)' if item.fitted else ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    steps = [*dense_steps(), *residency_steps(look_ahead=False)]
    ahead = residency_steps(look_ahead=True)
    print_rows([*steps, *ahead])
    print()
    told = summaries(steps, ahead)
    for name, summary in told.items():
        print(f"{name}: {tell(summary)}")
    refitted = fit(steps, prompt_frac=fit_prompt_frac())
    print(f"\nconstants in use {ENGINE_COSTS}\nfitted now       {refitted}")
    if options.output:
        result = environment() | {
            "gpu": asdict(H100),
            "constants": asdict(ENGINE_COSTS),
            "fitted_now": asdict(refitted),
            "summaries": told,
            "steps": [row_of(step) for step in (*steps, *ahead)],
            "held_out": held_out(steps),
            "figures": [asdict(item) for item in figures()],
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
