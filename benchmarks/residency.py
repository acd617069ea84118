"""What decode steps over two tiers take, against the bytes that they move, on a model shape.

Run from the root on a machine with a CUDA device: ``PYTHONPATH=benchmarks python
benchmarks/residency.py --trace RECORDING --output FILE``. Weights are random. Requests get their
places in both tiers as a prompt would leave them, without its computation (unless ``--prefill``),
and selections are those of the recording (unless there is none). The floor of a step is the larger
of its HBM bytes over the HBM rate (a copy, bytes read and written) and its link bytes over the
link's rate, both measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import torch
from report import environment

from sparsed.core import GIB, NO_RECALL, EngineSpec, SparseMethod
from sparsed.engine.batch import DecodeRow, PromptChunk, StepPlan
from sparsed.engine.kvcache.geometry import num_frames
from sparsed.engine.measure.ceilings import copy_bytes_per_s
from sparsed.engine.measure.clock import Clock
from sparsed.engine.models.dummy import dummy_config
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner
from sparsed.engine.sparse.mean_key import MeanKeySelector
from sparsed.engine.tiered import Placed
from sparsed.kernels.selected import Selected
from sparsed.profiler.machine import read_machine

WARM_STEPS: Final = 48
RANDOM_BYTES: Final = 60  # two of them are a float16 below 1.25: a scale like any other
SPARE_TOKENS: Final = 192  # of a request, for the steps that are measured


class Point(NamedTuple):
    """A batch of requests of equal contexts, all of one method. ``hbm_budget``: tokens a lane may
    hold, None for what the engine gives it."""

    requests: int
    context: int
    method: SparseMethod
    hbm_budget: int | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of a step, each captured alone: milliseconds of all layers together. ``attend_frac``:
    bytes of the selected pages over the time to attend to them, over the rate of a copy."""

    estimate_select_ms: float
    resolve_ms: float
    attend_ms: float
    attend_frac: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One batch. Bytes and milliseconds are of a step."""

    requests: int
    context_tokens: int
    method: str
    selections: str  # "replayed", "scored", or "dense"
    looks_ahead: bool
    hot_gib: float
    resident_ratio: float  # slots of a lane over pages selected
    miss_frac: float
    step_ms: float
    hbm_bytes: int
    link_bytes: int
    hbm_floor_ms: float
    link_floor_ms: float
    parts: Parts | None  # of sparse steps

    @property
    def ratio(self) -> float:
        return self.step_ms / max(self.hbm_floor_ms, self.link_floor_ms)

    def __str__(self) -> str:
        binds = "link" if self.link_floor_ms > self.hbm_floor_ms else "HBM"
        return (
            f"{self.requests:3} x {self.context_tokens:6} {self.selections:9} "
            f"{'look-ahead' if self.looks_ahead else '          '} "
            f"{self.hot_gib:5.1f} GiB {self.resident_ratio:5.2f}x misses {self.miss_frac:6.2%} "
            f"step {self.step_ms:7.3f} ms, HBM {self.hbm_floor_ms:6.3f}, link "
            f"{self.link_floor_ms:6.3f}: {self.ratio:.2f} of {binds}{self._told_parts()}"
        )

    def _told_parts(self) -> str:
        if self.parts is None:
            return ""
        parts = self.parts
        return (
            f"; select {parts.estimate_select_ms:.3f}, resolve {parts.resolve_ms:.3f}, attend "
            f"{parts.attend_ms:.3f} ms ({parts.attend_frac:.2f} of a copy)"
        )


class Bench:
    """One engine and its requests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._spec = make_spec(options)
        started_s = time.perf_counter()
        self.runner = Runner(self._spec, on_progress=lambda *_: None)
        self.clock = Clock(torch.device("cuda:0"))
        self.load_s = time.perf_counter() - started_s
        self.copy_rate = copy_bytes_per_s(self.clock)
        self.link_rate = self.runner.facts.link.h2d_bytes_per_s
        self.looks_ahead = self._spec.look_ahead
        self._step = 0
        selector = self.runner.kv.selector
        if isinstance(selector, MeanKeySelector) and not options.prefill:
            selector.store_SY.random_(0, RANDOM_BYTES)  # else all pages would be the same

    def always_select(self) -> None:
        """Until the steps are made anew."""
        assert self.runner.steps is not None
        self.runner.steps.rule = None

    def look_ahead(self) -> None:
        """From now on."""
        self.looks_ahead = True
        self.runner.look_ahead(True)

    def measure(self, point: Point) -> Row:
        """One batch."""
        with self._requests(point) as rows:
            for _ in range(WARM_STEPS):
                self._run(rows)
            before = self._counts()
            self.clock.synchronize()
            started_s = time.perf_counter()
            for _ in range(self._options.steps):
                self._run(rows)
            self.clock.synchronize()
            step_s = (time.perf_counter() - started_s) / self._options.steps
            counted = [a - b for a, b in zip(self._counts(), before, strict=True)]
            return self._row(point, rows, step_s=step_s, counted=counted)

    def _row(
        self, point: Point, rows: list[list[int]], *, step_s: float, counted: Sequence[int]
    ) -> Row:
        options, kv, steps = self._options, self.runner.kv, self._options.steps
        selected, missed, loaded_bytes = counted
        hbm_bytes = self._hbm_bytes(point, rows, selected // steps)
        link_bytes = loaded_bytes // steps
        count = max(1, options.budget // kv.geometry.page_size - 1)
        slots = kv.rows[rows[0][0]].num_blocks * kv.geometry.pages_per_block
        kind = "replayed" if options.trace else "scored"
        if selected == 0:  # wholly hot, and the engine found that cheaper
            kind = "in place"
        return Row(
            requests=point.requests,
            context_tokens=point.context,
            method=point.method.value,
            looks_ahead=self.looks_ahead,
            selections="dense" if point.method is SparseMethod.DENSE else kind,
            hot_gib=options.hot_gib,
            resident_ratio=slots / count,
            miss_frac=missed / max(1, selected),
            step_ms=step_s * 1e3,
            hbm_bytes=hbm_bytes,
            link_bytes=link_bytes,
            hbm_floor_ms=hbm_bytes / self.copy_rate * 1e3,
            link_floor_ms=link_bytes / self.link_rate * 1e3,
            parts=self._parts(selected // steps) if selected else None,
        )

    @torch.inference_mode()
    def _parts(self, selected_pages: int) -> Parts:
        """Parts of the last step, whose pages are all hot by now."""
        steps, kv = self.runner.steps, self.runner.kv
        assert steps is not None and steps.tiered is not None
        now, inputs = steps.tiered.now, steps.last_inputs()
        shape, arena_NTCD = self.runner.decoder.config.shape, kv.arena.pages_NTCD
        size, group = len(inputs.rows_B), shape.num_heads // shape.num_kv_heads
        q_BHGD = torch.randn((size, shape.num_kv_heads, group, shape.head_dim), device="cuda:0").to(
            arena_NTCD.dtype
        )
        width = steps.last.pages
        step = steps.tiered.begin(inputs, width=width, fetches=False)
        pages_L, placed_L = [], []
        for layer in range(shape.num_layers):
            pages_L.append(now.select(layer, q_BHGD, inputs, width=width).clone())
            for _ in range(2):  # all are hits the second time
                resolved = now.resolve(layer, pages_L[-1], inputs, step_1=inputs.step_1)
            selected = Selected(
                slots_BHK=resolved.slots_BHK.clone(),
                num_hits_BH=resolved.num_hits_BH.clone(),
                count_B=step.count_B,
                tail_slots_BH=resolved.tail_slots_BH.clone(),
                tail_tokens_B=step.tail_tokens_B,
            )
            placed_L.append(Placed(selected, None, None))
        tiered, out_BHGD = steps.tiered, torch.zeros_like(q_BHGD)
        lse_BHG = torch.zeros(q_BHGD.shape[:3], device=q_BHGD.device)
        select_s = self._captured_s(lambda layer: now.select(layer, q_BHGD, inputs, width=width))
        resolve_s = self._captured_s(
            lambda layer: now.resolve(layer, pages_L[layer], inputs, step_1=inputs.step_1)
        )
        attend_s = self._captured_s(
            lambda layer: tiered.attend(placed_L[layer], q_BHGD, out_BHGD=out_BHGD, lse_BHG=lse_BHG)
        )
        rate = selected_pages * kv.geometry.page_bytes / attend_s
        return Parts(
            estimate_select_ms=select_s * 1e3,
            resolve_ms=resolve_s * 1e3,
            attend_ms=attend_s * 1e3,
            attend_frac=rate / self.copy_rate,
        )

    def _captured_s(self, run_layer: Callable[[int], object]) -> float:
        """Seconds of all layers, captured and replayed."""
        layers = range(self.runner.decoder.config.shape.num_layers)
        with torch.inference_mode():
            run_layer(0)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for layer in layers:
                    run_layer(layer)
            return self.clock.median_s(graph.replay)

    def _hbm_bytes(self, point: Point, rows: list[list[int]], selected_pages: int) -> int:
        """Weights once, what is attended to, and summaries of all pages."""
        kv, shape = self.runner.kv, self.runner.decoder.config.shape
        embedding = shape.vocab_size * shape.hidden_size * 2
        weights = self.runner.decoder.weights.num_bytes - embedding
        tokens = sum(position for _, position in rows)
        if point.method is SparseMethod.DENSE or not selected_pages:
            return weights + tokens * shape.kv_bytes_per_token("bfloat16")
        frames = sum(num_frames(position) for _, position in rows)
        summaries = frames * kv.geometry.summary_bytes_per_frame(point.method)
        tails = len(rows) * kv.geometry.num_lanes * kv.geometry.page_bytes // 2
        return weights + selected_pages * kv.geometry.page_bytes + tails + summaries

    def _counts(self) -> tuple[int, int, int]:
        """Pages selected, those that were missing, bytes loaded."""
        self.clock.synchronize()
        stats = self.runner.stats()
        time.sleep(0.002)
        stats = self.runner.stats()
        return stats.hot_hits + stats.hot_misses, stats.hot_misses, stats.h2d_bytes

    def _run(self, rows: list[list[int]]) -> None:
        decodes = tuple(DecodeRow(row=row, token=None, position=at) for row, at in rows)
        self.runner.run(StepPlan(chunks=(), decodes=decodes))
        for row in rows:
            row[1] += 1

    @contextmanager
    def _requests(self, point: Point) -> Iterator[list[list[int]]]:
        kv, context = self.runner.kv, point.context
        kv.apply(replace(self._spec.knobs, hbm_budget=point.hbm_budget))
        indices = [
            kv.add(context + SPARE_TOKENS, method=point.method, token_budget=None)
            for _ in range(point.requests)
        ]
        for index in indices:
            if self._options.prefill:
                self._prefill(index, context)
            else:
                self._step += 1
                kv.reserve(index, context)
                kv.open_chunk(index, 0, context, step=self._step)
        yield [[index, context] for index in indices]
        for index in indices:
            kv.free(index)

    def _prefill(self, index: int, context: int) -> None:
        chunk = self._spec.knobs.prefill_chunk
        for start in range(0, context, chunk):
            end = min(context, start + chunk)
            tokens = tuple(torch.randint(0, 30000, (end - start,)).tolist())
            part = PromptChunk(
                row=index, tokens=tokens, start=start, prompt_length=context, logits_from=end
            )
            self.runner.run(StepPlan(chunks=(part,), decodes=()))


def make_spec(options: argparse.Namespace) -> EngineSpec:
    shape = dummy_config(options.model).shape
    most = max(point.context for point in options.points) + SPARE_TOKENS
    tokens = max(point.requests * (point.context + SPARE_TOKENS) for point in options.points)
    dram = tokens * shape.kv_bytes_per_token("bfloat16") / GIB * 1.01
    asked = {
        "sparse_method": SparseMethod.MEAN_KEY.value,
        "token_budget": options.budget,
        "page_size": options.page_size,
        "max_num_seqs": max(point.requests for point in options.points),
        "max_model_len": most,
        "kv_hbm_gib": options.hot_gib,
        "kv_dram_gib": dram,
    }
    knobs = resolve_knobs(
        asked, shape=shape, machine=read_machine(), device="cuda:0", dtype="bfloat16"
    )
    return EngineSpec(
        model=options.model,
        device="cuda:0",
        dtype="bfloat16",
        knobs=knobs,
        plan=plan_memory(knobs, shape=shape, dtype="bfloat16"),
        recall_stride=NO_RECALL,
        selection_trace=options.trace,
        look_ahead=options.look_ahead == "on",
    )


def parse_point(text: str) -> Point:
    """``8x32768``, ``8x32768:dense``, or ``8x32768@2176`` with the tokens a lane may hold."""
    batch, _, method = text.partition(":")
    batch, _, budget = batch.partition("@")
    requests, context = batch.split("x")
    return Point(
        int(requests),
        int(context),
        SparseMethod(method or SparseMethod.MEAN_KEY),
        int(budget) if budget else None,
    )


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dummy:llama-3.1-8b")
    parser.add_argument("--trace", help="a recording whose selections are replayed")
    parser.add_argument("--look-ahead", choices=("off", "on", "both"), default="off")
    parser.add_argument(
        "--always-select",
        action="store_true",
        help="measure all points once more, and let none attend in place though it is cheaper",
    )
    parser.add_argument("--prefill", action="store_true", help="compute the prompts")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--page-size", type=int, default=8)
    parser.add_argument("--hot-gib", type=float, default=18.0)
    parser.add_argument("--points", nargs="+", type=parse_point, required=True)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    bench = Bench(options)
    print(
        f"loaded in {bench.load_s:.0f} s; HBM copies {bench.copy_rate / 1e9:.0f} GB/s, link "
        f"{bench.link_rate / 1e9:.1f} GB/s",
        flush=True,
    )
    rows = []
    turns: list[Callable[[], None]] = [lambda: None]
    turns += [bench.always_select] if options.always_select else []
    turns += [bench.look_ahead] if options.look_ahead == "both" else []
    for begin in turns:
        begin()
        for point in options.points:
            rows.append(bench.measure(point))
            print(rows[-1], flush=True)
    rates = {"copy_bytes_per_s": bench.copy_rate, "link_bytes_per_s": bench.link_rate}
    result = environment() | rates | {"rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
