"""The real engine under random load for many steps: nothing lost, nothing wrong, nothing left.

Requests of every kind come in waves, are aborted at any moment and in part sent again with the
tokens they had, as after a crash; hot knobs change while they run; both tiers are much too small.
Every copy of a page is verified; between steps the page tables, and the hot tier against the DRAM
tier, are checked. Requests that are too long for the engine, and no others, must end with an error.
At the end the text of some greedy requests is compared with that of the same request alone on an
engine with room for everything. Exit status 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from report import environment, model_config, resolve_builtin
from soak_answers import Answer, Difference, Ledger, compare_texts
from soak_load import MAX_MODEL_LEN, MAX_NUM_SEQS, Load, SoakOptions, is_too_long
from soak_tiers import TierCheck

from sparsed.core import EngineSpec, EngineStats, FinishReason, Service, VerifyMode
from sparsed.engine.engine import Engine
from sparsed.engine.planner import plan_memory, resolve_knobs
from sparsed.engine.runner import Runner
from sparsed.profiler.machine import read_machine

ABORTS, KNOB_CHANGES = 0.04, 0.03  # a step
PROGRESS_S = 2.0

MakeRunner = Callable[[EngineSpec], Runner]


@dataclass(kw_only=True, slots=True)
class Result:
    """Counts of the whole run. ``pages_compared`` were read on both tiers between steps."""

    steps: int = 0
    requests: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    sent_again: int = 0
    tokens: int = 0
    knob_changes: int = 0
    evicted_pages: int = 0
    overflow_pages: int = 0
    hot_misses: int = 0
    loaded_pages: int = 0
    saved_pages: int = 0
    verified_pages: int = 0
    mismatches: int = 0
    pages_compared: int = 0
    texts_compared: int = 0
    differences: tuple[Difference, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        ended = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        ties = sum(difference.is_near_tie for difference in self.differences)
        return (
            f"{self.steps} steps in {self.seconds:.0f} s, {self.requests} requests ({ended}), "
            f"{self.sent_again} sent again, {self.tokens} tokens, {self.knob_changes} knob "
            f"changes\npages: {self.evicted_pages} evicted, {self.loaded_pages} loaded, "
            f"{self.saved_pages} saved, {self.overflow_pages} in passes, {self.verified_pages} "
            f"verified with {self.mismatches} mismatches, {self.pages_compared} equal on both "
            f"tiers\ntexts: {self.texts_compared} compared with the request alone, "
            f"{len(self.differences) - ties} differ, {ties} more at near ties"
        )

    def problems(self) -> list[str]:
        """What is not as it must be, in words."""
        found = [str(d) for d in self.differences if not d.is_near_tie]
        if self.mismatches:
            found.append(f"{self.mismatches} pages differ from what was saved")
        for name in ("verified_pages", "evicted_pages", "loaded_pages", "pages_compared"):
            if not getattr(self, name):
                found.append(f"no {name.replace('_', ' ')}: the run shows nothing")
        return found


class Soak:
    """One run over one engine; ``run`` drives it to the end."""

    def __init__(self, options: SoakOptions, *, runner: Runner, engine: Engine) -> None:
        self.ledger = Ledger()
        self.check = TierCheck(runner.kv)
        self.load = Load(options, vocab_size=runner.vocab_size)
        self.result = Result()
        self._options = options
        self._page_bytes = runner.kv.geometry.page_bytes
        self._engine = engine
        self._shown_s = time.perf_counter()

    def run(self) -> Result:
        """Wave after wave, idle in between. AssertionError at the first thing that is wrong."""
        started_s = time.perf_counter()
        try:
            while self.result.steps < self._options.steps:
                self._wave(*self.load.wave())
                self._drain()
        except AssertionError as error:
            error.add_note(f"at step {self.result.steps} of {self._options}")
            raise
        for answer in self.ledger.answers:
            assert answer.reason is not None, answer
            failed = answer.reason is FinishReason.ERROR
            assert failed is is_too_long(answer.request), answer
        self.result.seconds = time.perf_counter() - started_s
        self._engine.stats()  # a busy device may answer the next call only
        self.check.idle()
        self._sum_up(self._engine.stats())
        return self.result

    def _wave(self, arrivals: float, num_steps: int) -> None:
        end = min(self.result.steps + num_steps, self._options.steps)
        while self.result.steps < end:
            few = len(self.ledger.unfinished) < 2 * MAX_NUM_SEQS
            if few and self.load.happens(arrivals):
                self._add()
            if self.load.happens(KNOB_CHANGES):
                self._engine.apply(self._engine.knobs.with_values(self.load.knobs()))
                self.result.knob_changes += 1
            self._step()
            if self.ledger.unfinished and self.load.happens(ABORTS):
                self._abort(self.load.pick(self.ledger.unfinished))

    def _drain(self) -> None:
        while self._engine.has_work:
            self._step()
        self.check.idle()

    def _step(self) -> None:
        self.ledger.take(self._engine.step())
        self.result.steps += 1
        if self.result.steps % self._options.check_steps == 0:
            self.check()
        self._show_progress()

    def _add(self) -> None:
        request = self.load.request()
        self.ledger.add(request)
        self._engine.add(request)

    def _abort(self, answer: Answer) -> None:
        self._engine.abort(answer.request.request_id)
        if self.load.happens(0.5):
            self._engine.add(self.ledger.send_again(answer))

    def _show_progress(self) -> None:
        if time.perf_counter() - self._shown_s > PROGRESS_S and sys.stderr.isatty():
            self._shown_s = time.perf_counter()
            line = f"step {self.result.steps} of {self._options.steps}, {self.ledger.num_tokens}"
            print(f"\r{line} tokens", end="", file=sys.stderr, flush=True)

    def _sum_up(self, stats: EngineStats) -> None:
        result, answers = self.result, self.ledger.answers
        result.requests = len(answers)
        result.reasons = dict(Counter(str(answer.reason) for answer in answers))
        result.sent_again = sum(answer.num_resent for answer in answers)
        result.tokens = self.ledger.num_tokens
        result.evicted_pages = stats.evicted_pages
        result.overflow_pages = stats.overflow_pages
        result.hot_misses = stats.hot_misses
        result.loaded_pages = stats.h2d_bytes // self._page_bytes
        result.saved_pages = stats.d2h_bytes // self._page_bytes
        result.verified_pages = stats.verify_checked_pages
        result.mismatches = stats.verify_mismatches
        result.pages_compared = self.check.pages_compared


def make_spec(options: SoakOptions, *, roomy: bool = False) -> EngineSpec:
    """The spec of the engine under test, or of one with room for every request at once."""
    model = str(resolve_builtin()) if options.model == "smollm2-135m" else options.model
    values = {
        "page_size": options.page_size,
        "sparse_method": options.sparse_method,
        "dense_layers": options.dense_layers,
        "retrieval_stride": options.retrieval_strides[0],
        "token_budget": 512,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_model_len": MAX_MODEL_LEN,
    }
    shape, dtype = model_config(model).shape, options.dtype
    machine = read_machine()
    knobs = resolve_knobs(values, shape=shape, machine=machine, device=options.device, dtype=dtype)
    plan = plan_memory(knobs, shape=shape, dtype=dtype)
    if not roomy:
        num_blocks = 1 + options.lane_blocks * shape.num_lanes
        plan = replace(plan, num_blocks=num_blocks, num_frames=options.num_frames)
    return EngineSpec(
        model=model,
        device=options.device,
        dtype=dtype,
        knobs=knobs,
        plan=plan,
        enforce_eager=options.enforce_eager,
        always_select=True,  # texts are compared with those of other company
        verify_kv=VerifyMode.OFF if roomy else VerifyMode.FULL,
    )


def load_runner(spec: EngineSpec) -> Runner:
    return Runner(spec, on_progress=lambda phase, frac: None)


def run_soak(options: SoakOptions, *, make_runner: MakeRunner = load_runner) -> Result:
    """The whole run, the comparison with single requests included where the dtype allows it."""
    spec = make_spec(options)
    runner = make_runner(spec)
    soak = Soak(options, runner=runner, engine=_engine(runner, spec))
    result = soak.run()
    if options.dtype == "float32":
        strides = options.retrieval_strides
        candidates = [a for a in soak.ledger.answers if a.is_comparable(strides)]
        chosen = soak.load.sample(candidates, options.num_compared)
        del soak, runner
        result.texts_compared = len(chosen)
        spec = make_spec(options, roomy=True)
        alone = _engine(load_runner(spec), spec)
        result.differences = tuple(compare_texts(chosen, alone))
    return result


def _engine(runner: Runner, spec: EngineSpec) -> Engine:
    """One without a quality breaker: which steps are sampled depends on the company, and texts are
    compared."""
    return Engine(runner, knobs=spec.knobs, service=Service(recall_floor=0.0))


def parse_options() -> tuple[SoakOptions, Path | None]:
    default = SoakOptions(device="cuda:0" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--model", default=default.model, help="dummy:<shape>, smollm2-135m, a path"
    )
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--dtype", default=default.dtype)
    parser.add_argument("--page-size", type=int, default=default.page_size)
    parser.add_argument("--sparse-method", default=default.sparse_method)
    parser.add_argument("--dense-layers", type=int, default=default.dense_layers)
    parser.add_argument(
        "--retrieval-strides", type=int, nargs="+", default=default.retrieval_strides
    )
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--lane-blocks", type=int, default=default.lane_blocks)
    parser.add_argument("--num-frames", type=int, default=default.num_frames)
    parser.add_argument("--num-compared", type=int, default=default.num_compared)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    values = vars(parser.parse_args())
    output = values.pop("output")
    return SoakOptions(**values), output


def main() -> int:
    options, output = parse_options()
    result = run_soak(options)
    print(result, flush=True)
    problems = result.problems()
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    if output:
        found = {"options": asdict(options), "result": asdict(result), "problems": problems}
        output.write_text(json.dumps(environment() | found, indent=2) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
