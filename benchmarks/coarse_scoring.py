"""Scoring of every page's summary against coarse-to-fine, with the top-k, on one device.

Run from the root on a machine with a CUDA device: ``PYTHONPATH=benchmarks python
benchmarks/coarse_scoring.py --output FILE``. It takes about two minutes and 10 GB of the device.
Synthetic keys of the shape of a model, one layer, in bf16 and in 8 bits with a scale a page: *flat*
scores all pages and takes the best; *coarse* scores super-pages, then the pages of the best ones.
Times are of captured graphs over inputs that no cache holds; bytes are those that scoring must
move: summaries, scales, row numbers, scores. Prints the targets at the end.
"""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from report import environment
from targets import Target, print_targets, write_result
from torch import Tensor

from sparsed.core import BLOCK_TOKENS
from sparsed.engine.measure.cases import Setting, permutation
from sparsed.engine.measure.ceilings import copy_bytes_per_s, give_back_memory
from sparsed.engine.measure.clock import Clock
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.sparse.coarse import (
    Level,
    score_coarse_to_fine,
    select_pages,
    super_summaries,
)
from sparsed.engine.sparse.int8 import to_int8
from sparsed.kernels.bounds import page_bounds

CONTEXTS: Final = tuple(1024 * kilo for kilo in (8, 16, 32, 64, 128, 256, 512))
DTYPES: Final = ("bf16", "int8")
SHORT, LONG = 32768, 524288  # the contexts that targets compare
MOST_BYTES: Final = 1 / 3  # of flat, at the shorter one
MOST_GROWTH: Final = 16.0  # that of the context
MADE_PAGES: Final = 1 << 14  # keys are made for so many pages at a time
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """One case: what is scored, and how much of it is chosen."""

    batch: int
    heads: int
    dim: int
    context: int
    page_size: int
    super_tokens: int
    num_supers: int
    count: int
    int8: bool

    @property
    def frames(self) -> int:
        """Of a lane."""
        return self.context // BLOCK_TOKENS

    @property
    def pages(self) -> int:
        return self.context // self.page_size

    @property
    def supers(self) -> int:
        return self.context // self.super_tokens

    @property
    def lanes(self) -> int:
        return self.batch * self.heads

    def moved_bytes(self, *, summaries: int, rows: int) -> int:
        """Bytes that a pass over so many summaries of a lane must move."""
        summary = 2 * self.dim * (1 if self.int8 else 2) + (2 if self.int8 else 0)
        return self.lanes * (summaries * (summary + 4) + rows * 8)

    @property
    def flat_bytes(self) -> int:
        return self.moved_bytes(summaries=self.pages, rows=self.frames)

    @property
    def coarse_bytes(self) -> int:
        """Of both passes."""
        chosen = self.num_supers * self.super_tokens
        return self.moved_bytes(summaries=self.supers, rows=self.supers) + self.moved_bytes(
            summaries=chosen // self.page_size, rows=chosen // BLOCK_TOKENS
        )


class Input(NamedTuple):
    """One rotated input; ``chosen_BHF`` are as many rows as the second pass reads."""

    query_BHE: Tensor
    fine: Level
    coarse: Level
    num_full_B: Tensor
    chosen_BHF: Tensor


def list_sizes(options: argparse.Namespace) -> Iterator[Sizes]:
    shape = dummy_config(options.model).shape
    assert options.super_tokens % BLOCK_TOKENS == 0
    assert options.num_supers * options.super_tokens >= options.budget
    for dtype in options.dtypes:
        for batch in options.batches:
            for context in options.contexts:
                assert context % options.super_tokens == 0 and context > options.budget
                yield Sizes(
                    batch=batch,
                    heads=shape.num_kv_heads,
                    dim=shape.head_dim,
                    context=context,
                    page_size=options.page_size,
                    super_tokens=options.super_tokens,
                    num_supers=min(options.num_supers, context // options.super_tokens),
                    count=options.budget // options.page_size,
                    int8=dtype == "int8",
                )


def make_summaries(setting: Setting, count: int) -> Tensor:
    """Of ``count`` pages of random keys, (count, E)."""
    dim, page_size = setting.shape.head_dim, setting.page_size
    made = setting.random(0, 2 * dim).new_empty((count, 2 * dim))
    for part_ME in made.split(MADE_PAGES):
        pages_MTCD = setting.random(len(part_ME), page_size, 2, dim)
        part_ME.copy_(page_bounds(pages_MTCD, minmax=False).flatten(1))
    return made


def make_level(setting: Setting, summaries_NXE: Tensor, sizes: Sizes) -> Level:
    """Rows in the order of the lanes, stored in no order."""
    rows_N = permutation(setting, len(summaries_NXE))
    store_RXE = torch.empty_like(summaries_NXE).index_copy_(0, rows_N, summaries_NXE)
    rows_BHN = rows_N.view(sizes.batch, sizes.heads, -1)
    if not sizes.int8:
        return Level(store_RXE, rows_BHN)
    steps_RXE, scales_RX = to_int8(store_RXE)
    return Level(steps_RXE, rows_BHN, scales_RX)


def make_input(setting: Setting, sizes: Sizes) -> Input:
    pages_ME = make_summaries(setting, sizes.lanes * sizes.pages)
    per_super = sizes.super_tokens // sizes.page_size
    supers_N1E = super_summaries(
        pages_ME.view(-1, per_super, pages_ME.shape[1]), pages_per_super=per_super
    )
    pages_NXE = pages_ME.view(sizes.lanes * sizes.frames, -1, pages_ME.shape[1])
    fine = make_level(setting, pages_NXE, sizes)
    q_BHD = setting.random(sizes.batch, sizes.heads, sizes.dim)
    num_chosen = sizes.num_supers * sizes.super_tokens // BLOCK_TOKENS
    return Input(
        query_BHE=torch.cat((q_BHD.clamp(min=0), q_BHD.clamp(max=0)), dim=-1),
        fine=fine,
        coarse=make_level(setting, supers_N1E, sizes),
        num_full_B=torch.full((sizes.batch,), sizes.pages, device=setting.device),
        chosen_BHF=fine.rows[..., :num_chosen].contiguous(),
    )


def score_flat(x: Input) -> Tensor:
    return x.fine.score(x.query_BHE, rows=x.fine.rows)


def select_flat(x: Input, *, count: int) -> Tensor:
    return select_pages(score_flat(x), num_full_B=x.num_full_B, count=count)


def score_coarse(x: Input) -> tuple[Tensor, Tensor]:
    """Both passes without the choice between them."""
    return (
        x.coarse.score(x.query_BHE, rows=x.coarse.rows),
        x.fine.score(x.query_BHE, rows=x.chosen_BHF),
    )


def select_coarse(x: Input, *, count: int, num_supers: int) -> Tensor:
    found = score_coarse_to_fine(
        x.query_BHE,
        fine=x.fine,
        coarse=x.coarse,
        num_full_B=x.num_full_B,
        num_supers=num_supers,
    )
    return select_pages(
        found.scores_BHP, num_full_B=x.num_full_B, count=count, pages_BHP=found.pages_BHP
    )


def time_us(clock: Clock, inputs: Sequence[Input], work: Callable[[Input], object]) -> float:
    """Of one input; always as a graph, so that no launch is waited for."""
    return 1e6 * clock.each_s([partial(work, x) for x in inputs], graph_below_s=math.inf)


def measure(sizes: Sizes, *, setting: Setting, clock: Clock) -> Row:
    """Times in microseconds, with the choice and of scoring alone; bytes that scoring moves."""
    count = setting.rotations(sizes.coarse_bytes)  # the fewer bytes: both outgrow the caches
    inputs = [make_input(setting, sizes) for _ in range(count)]
    flat = partial(select_flat, count=sizes.count)
    coarse = partial(select_coarse, count=sizes.count, num_supers=sizes.num_supers)
    row: Row = asdict(sizes) | {
        "dtype": "int8" if sizes.int8 else "bf16",
        "rotations": count,
        "flat_us": time_us(clock, inputs, flat),
        "coarse_us": time_us(clock, inputs, coarse),
        "flat_score_us": time_us(clock, inputs, score_flat),
        "coarse_score_us": time_us(clock, inputs, score_coarse),
        "flat_bytes": sizes.flat_bytes,
        "coarse_bytes": sizes.coarse_bytes,
    }
    row["speedup"] = row["flat_us"] / row["coarse_us"]
    row["bytes_frac"] = row["coarse_bytes"] / row["flat_bytes"]
    del inputs
    give_back_memory(setting.device)
    return row


def growths(rows: Sequence[Row], key: str) -> list[float]:
    """How ``key`` grows between the two contexts, for each dtype and batch."""
    found = {(row["dtype"], row["batch"], row["context"]): row[key] for row in rows}
    return [
        value / found[*case, SHORT]
        for (*case, context), value in found.items()
        if context == LONG and (*case, SHORT) in found
    ]


def list_targets(rows: Sequence[Row]) -> list[Target]:
    """The worst of every dtype and batch against each bound."""
    short = [row["bytes_frac"] for row in rows if row["context"] == SHORT]
    targets = [
        Target("scored bytes at 32k, of flat", max(short, default=None), operator.le, MOST_BYTES)
    ]
    for key, words in (
        ("coarse_bytes", "scored bytes"),
        ("coarse_us", "time with the top-k"),
        ("coarse_score_us", "time of scoring alone"),
    ):
        worst = max(growths(rows, key), default=None)
        words = f"{words}, 512k over 32k"
        targets.append(Target(words, worst, operator.lt, MOST_GROWTH))
    return targets


def print_row(row: Row, *, copy_rate: float) -> None:
    rate = row["flat_bytes"] / row["flat_score_us"] * 1e6 / copy_rate
    print(
        f"{row['dtype']:>5} {row['batch']:>5} {row['context'] // 1024:>5}k"
        f"{row['flat_us']:>10.1f}{row['flat_score_us']:>10.1f}{row['flat_bytes'] / 1e6:>9.2f}"
        f"{rate:>7.2f}{row['coarse_us']:>10.1f}{row['coarse_score_us']:>10.1f}"
        f"{row['coarse_bytes'] / 1e6:>9.2f}{row['speedup']:>8.2f}{row['bytes_frac']:>8.3f}",
        flush=True,
    )


def measure_all(options: argparse.Namespace) -> Row:
    device = torch.device(options.device)
    setting = Setting(
        device=device,
        dtype=torch.bfloat16,
        shape=dummy_config(options.model).shape,
        page_size=options.page_size,
        batches=options.batches,
        contexts=options.contexts,
    )
    clock = Clock(device)
    copy_rate = copy_bytes_per_s(clock)
    print(f"{'':>18}{'flat us':>10}{'scoring':>10}{'MB':>9}{'/copy':>7}", end="")
    print(f"{'coarse us':>10}{'scoring':>10}{'MB':>9}{'speedup':>8}{'bytes':>8}")
    rows = []
    for sizes in list_sizes(options):
        rows.append(measure(sizes, setting=setting, clock=clock))
        print_row(rows[-1], copy_rate=copy_rate)
    for key in ("flat_bytes", "flat_us", "coarse_bytes", "coarse_us"):
        factors = ", ".join(f"{factor:.2f}" for factor in growths(rows, key))
        print(f"{key} from 32k to 512k, times: {factors or 'not measured'}")
    return {"copy_bytes_per_s": copy_rate, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dummy:llama-3.1-8b", help="its KV heads are scored")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--super-tokens", type=int, default=256)
    parser.add_argument("--num-supers", type=int, default=32, help="super-pages that are chosen")
    parser.add_argument("--budget", type=int, default=2048, help="tokens that are chosen of those")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    result = environment() | measure_all(options)
    targets = list_targets(result["rows"])
    print_targets(targets)
    if options.output:
        write_result(options.output, result, targets)


if __name__ == "__main__":
    main()
