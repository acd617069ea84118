"""Windows of ``sparsed tune`` for benchmarks: one engine, one workload, any knobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsed.controller.config import load_config
from sparsed.controller.prompts import prompt_source
from sparsed.controller.startup import prepare
from sparsed.controller.trials import EngineBench
from sparsed.controller.tuning import DEADLINE_FACTOR, MIN_DEADLINE_S
from sparsed.controller.workload import expected_s, fit_workload, load_workload, recall_stride
from sparsed.core import KnobValue, Workload
from sparsed.tuner.objective import TrialFailed
from sparsed.tuner.trials import NUM_REPEATS


def knob_flags(flags: list[str]) -> dict[str, str | bool | None]:
    """``--name value`` pairs by the names of the configuration; ValueError for anything else."""
    names, values = flags[::2], flags[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise ValueError(f"{flags} are not pairs of --name value")
    pairs = zip(names, values, strict=True)
    return {name[2:].replace("-", "_"): value for name, value in pairs}


class Bench:
    """The measure of ``sparsed tune``; ``close`` ends its engine."""

    def __init__(self, model: str, state_dir: str, flags: list[str], *, trial_s: float) -> None:
        asked = {"model": model, "state_dir": state_dir, "device": "cpu"} | knob_flags(flags)
        config = replace(load_config(flags=asked, environment={}, file=None), no_profile=True)
        self.plan = prepare(config, progress=lambda phase, frac: None)
        Path(config.state_dir.run_dir).mkdir(parents=True, exist_ok=True)
        self.engine = EngineBench(config, self.plan, prompts=prompt_source(self.plan))
        self.workload: Workload
        self._trial_s = trial_s
        self._deadline_s = MIN_DEADLINE_S

    async def prepare(self, workload: Workload | None) -> Workload:
        """Warm up; None: cut the mixed workload to what this machine serves in a window."""
        times = await self.engine.probe()
        if workload is None:
            workload = fit_workload(
                load_workload("mixed"),
                max_tokens=self.plan.spec.knobs.max_model_len,
                window_s=self._trial_s / NUM_REPEATS,
                times=times,
            ).workload
        await self.engine.sample_recall(stride=recall_stride(workload))
        expected = expected_s(workload.requests, times=times)
        self._deadline_s = max(MIN_DEADLINE_S, DEADLINE_FACTOR * expected)
        self.workload = workload
        return workload

    async def windows(
        self, values: Mapping[str, KnobValue], *, num: int, order: int = 0
    ) -> dict[str, Any]:
        """Tokens/s of ``num`` windows; None, and the reason, where one could not be served."""
        scores: list[float | None] = []
        reason = ""
        for _ in range(num):
            try:
                measured = await self.engine.measure(
                    values, workload=self.workload, deadline_s=self._deadline_s, order=order
                )
            except TrialFailed as error:
                scores.append(None)
                reason = str(error)
                break
            scores.append(None if measured.errors else measured.output_tokens / measured.duration_s)
        return {"scores": scores, "reason": reason}

    async def close(self) -> None:
        await self.engine.close()
