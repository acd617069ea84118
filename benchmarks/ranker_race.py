"""The race of page rankings on real text: perplexity, recall, output error, locality, needles.

Run from the root on a machine with a CUDA device: ``PYTHONPATH=benchmarks python
benchmarks/ranker_race.py --model DIR --context 30720 --output DIR``. Stages run in the order
given and each text of a stage is written as soon as it is done (``STAGE-TEXT.json``), so that a
run that is cut keeps what it measured. A calibration is learned first from windows of the prose
and of the code that no stage judges, and written beside the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import torch
from report import cache_directory, environment

from sparsed.core import (
    MEAN_KEY,
    BudgetRule,
    Choice,
    GroupRule,
    MetadataFormat,
    Quality,
    RankMethod,
)
from sparsed.engine.assembly import load_decoder
from sparsed.engine.evaluate.calibrate import calibrate
from sparsed.engine.evaluate.calibration import Calibration, load_calibration, save_calibration
from sparsed.engine.evaluate.needles import make_needles
from sparsed.engine.evaluate.race import Race
from sparsed.engine.evaluate.texts import Window, cut_windows, load_tokenizer, read_tokens

TEXTS: Final = ("prose", "documentation", "code", "questions")
LEARNED_FROM: Final = ("prose", "code")
HAYSTACK: Final = "documentation"
NEEDLE_DEPTHS: Final = tuple((i + 0.5) / 8 for i in range(8))
GATE_DIMS: Final = 64

CUBOID = Choice(method=RankMethod.CUBOID_MEAN)
ORACLE = Choice(method=RankMethod.ORACLE, group_rule=GroupRule.SOFTMAX_SUM)
FINE = MEAN_KEY  # the default: 22 bytes of metadata a page and lane
SPREAD = replace(FINE, method=RankMethod.VARIANCE, kept_dims=16)
EVERY_KEY = replace(FINE, method=RankMethod.EVERY_KEY, kept_dims=16, metadata=MetadataFormat.INT8)
FLAT = replace(FINE, kept_dims=None, metadata=MetadataFormat.BF16)
CLUSTERS = Choice(method=RankMethod.CLUSTERS)
GATE = Choice(method=RankMethod.GATE, page_size=16, group_rule=GroupRule.SOFTMAX_SUM)
MEAN = Choice(method=RankMethod.MEAN, page_size=16)
ESTIMATED: Final = 0.232  # share of the context, as RetroInfer has it
FEW = (CUBOID, FINE, replace(ORACLE, page_size=8), CLUSTERS)
SHARES: Final = (1 / 32, 1 / 8, 1 / 4)
NEEDLES: Final[dict[str, tuple[Choice, ...]]] = {  # two sets, for two processes
    "rankings": (
        FINE,
        FLAT,
        replace(FINE, kept_dims=32),
        replace(FINE, kept_dims=64),
        replace(FINE, super_pages=16),
        CUBOID,
        replace(CUBOID, page_size=8, recent_pages=8),
        SPREAD,
        GATE,
        CLUSTERS,
    ),
    "shares": tuple(
        replace(choice, share=share)
        for share in (1 / 8, 1 / 4)
        for choice in (CUBOID, FINE, replace(ORACLE, page_size=8), FLAT)
    ),
}

STAGES: Final[dict[str, tuple[Choice, ...]]] = {
    "methods": (
        *FEW,
        ORACLE,
        FLAT,
        SPREAD,
        replace(SPREAD, kept_dims=None, metadata=MetadataFormat.BF16),
        EVERY_KEY,
        GATE,
        replace(CUBOID, page_size=8, recent_pages=8),
        Choice(method=RankMethod.QUEST, page_size=16),
        MEAN,
        replace(MEAN, method=RankMethod.MEAN_SPREAD),
        replace(CLUSTERS, estimated=ESTIMATED),
        Choice(method=RankMethod.RANDOM),
    ),
    "shares": tuple(replace(choice, share=share) for share in SHARES for choice in FEW),
    "formats": (
        *(replace(FINE, metadata=kind) for kind in (MetadataFormat.BF16, MetadataFormat.INT8)),
        *(replace(FINE, kept_dims=dims) for dims in (16, 32, 64)),
        replace(SPREAD, kept_dims=20),
        replace(EVERY_KEY, kept_dims=8, metadata=MetadataFormat.INT4),
        *(replace(FINE, super_pages=pages) for pages in (4, 16)),
    ),
    "rules": (
        *(replace(FINE, group_rule=rule) for rule in GroupRule if rule != FINE.group_rule),
        *(replace(ORACLE, page_size=8, group_rule=rule) for rule in GroupRule),
        replace(CUBOID, page_size=16, group_rule=GroupRule.SOFTMAX_SUM),
        replace(MEAN, group_rule=GroupRule.SOFTMAX_SUM),
    ),
    "grains": (
        *(replace(FINE, page_size=size, recent_pages=64 // size) for size in (16, 32)),
        *(replace(FINE, page_size=size, grain=8, recent_pages=64 // size) for size in (16, 32)),
        *(replace(CUBOID, grain=grain) for grain in (8, 16)),
        *(replace(CUBOID, page_size=64, grain=grain) for grain in (8, 16)),
        replace(FINE, super_pages=16, coarse=2.0),
        replace(FINE, super_pages=32),
    ),
    "budgets": (
        replace(CUBOID, dense_layers=1),
        replace(FINE, dense_layers=1),
        replace(FINE, budgets=BudgetRule.LAYER),
        replace(FINE, budgets=BudgetRule.HEAD),
        replace(FINE, sink_pages=8),
        replace(FINE, recent_pages=1),
        replace(FINE, recent_pages=32),
        replace(MEAN, estimated=ESTIMATED),
        replace(CUBOID, page_size=16, estimated=ESTIMATED),
    ),
}


class Bench:
    """One model with its texts, cut, and its calibration."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_float32_matmul_precision("high")
        self._options = options
        self._device = torch.device(options.device)
        self._tokenizer = load_tokenizer(options.model)
        self._decoder = load_decoder(
            str(options.model),
            device=self._device,
            dtype=getattr(torch, options.dtype),
            on_progress=lambda phase, frac: None,
        )
        self._texts: dict[str, list[Window]] = {}
        self._held_out: list[Window] = []
        for name in dict.fromkeys((*options.texts, *LEARNED_FROM)):
            self._cut(name)
        self._calibration = self._calibrate()

    def run(self, stage: str) -> None:
        """Every choice of a stage on every text."""
        race = Race(self._decoder, STAGES[stage], calibration=self._calibration)
        for text in self._options.texts:
            started_s = time.perf_counter()
            rows = race.run_text(text, self._texts[text], on_progress=lambda phase, frac: None)
            for row in rows:
                print(describe(row), flush=True)
            seconds = time.perf_counter() - started_s
            self._write(f"{stage}-{text}", {"quality": [asdict(row) for row in rows]}, seconds)

    def needles(self, name: str, per_cell: int) -> None:
        """One set of choices on needles of three lengths."""
        options, started_s = self._options, time.perf_counter()
        haystack = read_tokens(HAYSTACK, tokenizer=self._tokenizer, cache_dir=options.cache)
        needles = make_needles(
            self._tokenizer,
            haystack,
            lengths=[options.context // part for part in (4, 2, 1)],
            depths=NEEDLE_DEPTHS,
            per_cell=per_cell,
            seed=0,
        )
        race = Race(self._decoder, NEEDLES[name], calibration=self._calibration)
        scores = race.run_needles(needles, on_progress=lambda phase, frac: None)
        for choice in race.choices:
            mine = [score for score in scores if score.choice == choice]
            found, asked = sum(s.num_found for s in mine), sum(s.num_asked for s in mine)
            print(f"needles {choice}: {found} of {asked}", flush=True)
        seconds = time.perf_counter() - started_s
        self._write(f"needles-{name}", {"needles": [asdict(score) for score in scores]}, seconds)

    def _cut(self, name: str) -> None:
        options = self._options
        spare = int(name in LEARNED_FROM)
        windows = cut_windows(
            name,
            tokenizer=self._tokenizer,
            cache_dir=options.cache,
            count=options.windows + spare,
            context_tokens=options.context,
            scored_tokens=options.scored,
        )
        self._texts[name] = windows[: options.windows]
        self._held_out += windows[options.windows :]

    def _calibrate(self) -> Calibration:
        path = self._options.output / "calibration.safetensors"
        if path.exists():
            return load_calibration(path, device=self._device, shape=self._decoder.config.shape)
        made = calibrate(
            self._decoder,
            self._held_out,
            gate_dims=GATE_DIMS,
            on_progress=lambda phase, frac: None,
        )
        save_calibration(made, path)
        return made

    def _write(self, name: str, result: dict[str, object], seconds: float) -> None:
        options = self._options
        setting = {
            "model": options.model.name,
            "dtype": options.dtype,
            "context_tokens": options.context,
            "scored_tokens": options.scored,
            "windows": options.windows,
            "seconds": round(seconds, 1),
        }
        path = options.output / f"{name}.json"
        path.write_text(json.dumps(environment() | setting | result, indent=1) + "\n")


def describe(row: Quality) -> str:
    """One line of a table."""
    recall = f"{row.recall_mean:.3f}/{row.recall_p01:.3f}" if row.recall_mean else "-"
    error = f"{row.error_mean:.4f}" if row.error_mean else "-"
    misses = f"{row.locality.miss_fracs[4]:.2%}" if row.locality else "-"
    return (
        f"{row.text[:8]:8} {row.choice!s:90} {row.ratio:.4f} [{row.ratio_low:.4f}, "
        f"{row.ratio_high:.4f}] reads {row.reads:.4f} metadata {row.metadata_bytes:.0f} B "
        f"recall {recall} error {error} misses at 4x {misses}"
    )


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--output", type=Path, required=True, help="directory of the results")
    parser.add_argument("--cache", type=Path, default=cache_directory(), help="of the texts")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=30720)
    parser.add_argument("--scored", type=int, default=2047)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--stages", nargs="*", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--needles", nargs="*", choices=list(NEEDLES), default=[])
    parser.add_argument("--per-cell", type=int, default=2, help="needles of each length and depth")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for stage in options.stages:
        bench.run(stage)
    for name in options.needles:
        bench.needles(name, options.per_cell)


if __name__ == "__main__":
    main()
