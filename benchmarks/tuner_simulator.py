"""A simulated engine as a search sees it: windows with noise, and the truth for the judge."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Final

import numpy as np
from landscape import (
    DEVICE_BYTES,
    WEIGHTS_BYTES,
    Load,
    Settings,
    Truth,
    evaluate,
    expect,
    hbm_peak_bytes,
)
from recorded_curves import Curves

from sparsed.core import Knobs, KnobValue
from sparsed.tuner.beliefs import Expectation
from sparsed.tuner.constrained import MemoryLimit
from sparsed.tuner.policy import Constraint, Crash, Observation
from sparsed.tuner.space import Point, SearchSpace, build_space

AUTO_HBM_BUDGET: Final = 4096
MAX_RECALL_LOSS: Final = 0.05  # below the default's
MAX_LINK_BUSY: Final = 0.9
MEMORY_MARGIN_BYTES: Final = 4e9
MEMORY_ERROR: Final = 0.95  # what the known model says over what is true, beside the weights
SLOW_FRAC: Final = 0.06  # of windows, which give
SLOW_FACTOR: Final = 0.75  # of the goodput
NOISE: Final = {  # standard deviation of the logarithm
    "goodput": 0.05,
    "ttft": 0.06,
    "tpot": 0.04,
    "loss": 0.03,
    "hbm": 0.002,
    "link": 0.04,
}


@cache
def _valid_points(space: SearchSpace) -> tuple[Point, ...]:
    """Seconds to find, and the same for every load; once in each process."""
    return tuple(space.points())


class Simulator:
    """One load: its space and the valid points of it, its truth, and windows with noise. The truth
    is never handed out."""

    def __init__(self, load: Load) -> None:
        self.load = load
        default = Knobs(
            token_budget=2048,
            hbm_budget=None,
            max_num_active_seqs=load.default_active_seqs,
            prefill_chunk=2048,
            page_size=32,
            sparse_method="mean-key",
            dense_layers=0,
            max_num_seqs=128,
            kv_hbm_gib=60.0,
            kv_dram_gib=104.0,
            max_model_len=65536,
        )
        self.space: SearchSpace = build_space(default, auto_hbm_budget=AUTO_HBM_BUDGET)
        # Loads differ in a default that every point has a value for.
        alike = default.with_values({"max_num_active_seqs": 1})
        self.points = _valid_points(replace(self.space, default=alike))
        self._index = {point: i for i, point in enumerate(self.points)}
        self._settings = _settings(self.space, self.points)
        self._expected = _rows(expect(self._settings, load))
        self._truth = evaluate(self._settings, load, Curves())
        start = self._index[self.space.encode({})]
        self._floor = float(self._truth.attention_recall[start]) - MAX_RECALL_LOSS
        self._is_good = self._limits_hold()
        self.optimum = float(self._truth.goodput[self._is_good].max())

    def share(self, values: Mapping[str, KnobValue]) -> float:
        """True goodput over the optimum; 0 where a limit is broken."""
        i = self._index[self.space.encode(values)]
        return float(self._truth.goodput[i]) / self.optimum if self._is_good[i] else 0.0

    def frac_above(self, share: float) -> float:
        """Share of all points that are that good, and within all limits."""
        return float((self._is_good & (self._truth.goodput > share * self.optimum)).mean())

    def measure(self, values: Mapping[str, KnobValue], *, generator: random.Random) -> Observation:
        """What a window of the engine exports, and what the tuner makes of it."""
        i = self._index[self.space.encode(values)]
        truth = {item.name: float(getattr(self._truth, item.name)[i]) for item in fields(Truth)}

        def noisy(value: float, name: str) -> float:
            return value * math.exp(generator.gauss(0.0, NOISE[name]))

        peak_bytes = noisy(truth["hbm_peak_bytes"], "hbm")
        if peak_bytes > DEVICE_BYTES:
            return Observation(values=values, objective=None, crash=Crash.OOM_DEVICE)
        slow = SLOW_FACTOR if generator.random() < SLOW_FRAC else 1.0
        goodput = noisy(truth["goodput"], "goodput") * slow
        loss = noisy(1.0 - truth["attention_recall"], "loss")
        slacks = self._slacks(
            ttft_s=noisy(truth["ttft_p95_s"], "ttft"),
            tpot_s=noisy(truth["tpot_p95_s"], "tpot"),
            peak_bytes=peak_bytes,
            link_frac=noisy(truth["link_busy_frac"], "link"),
            loss=loss,
        )
        return Observation(values=values, objective=math.log(max(goodput, 1e-6)), slacks=slacks)

    def prior(self, values: Mapping[str, KnobValue]) -> Expectation:
        """What a roofline expects of ``values``."""
        i = self._index[self.space.encode(values)]
        says = self._expected[i]
        slacks = self._slacks(
            ttft_s=says["ttft_p95_s"],
            tpot_s=says["tpot_p95_s"],
            peak_bytes=says["hbm_peak_bytes"],
            link_frac=says["link_busy_frac"],
            loss=1.0 - says["attention_recall"],
        )
        return Expectation(objective=math.log(max(says["goodput"], 1e-6)), slacks=slacks)

    def _slacks(
        self, *, ttft_s: float, tpot_s: float, peak_bytes: float, link_frac: float, loss: float
    ) -> dict[Constraint, float]:
        return {
            Constraint.TTFT: ttft_s / self.load.ttft_s - 1,
            Constraint.TPOT: tpot_s / self.load.tpot_s - 1,
            Constraint.HBM: peak_bytes / DEVICE_BYTES - 1,
            Constraint.LINK: link_frac / MAX_LINK_BUSY - 1,
            Constraint.QUALITY: loss / (1.0 - self._floor) - 1,
        }

    def memory_limit(self) -> MemoryLimit:
        """A model of the peak that is 5 % too low in what depends on the knobs."""
        names = [ladder.name for ladder in self.space.ladders]
        known = hbm_peak_bytes(self._settings, self.load)
        believed = WEIGHTS_BYTES + MEMORY_ERROR * (known - WEIGHTS_BYTES)

        def predict(values: Mapping[str, KnobValue]) -> float:
            assert set(values) >= set(names)
            return float(believed[self._index[self.space.encode(values)]])

        return MemoryLimit(
            predict=predict, limit_bytes=DEVICE_BYTES, margin_bytes=MEMORY_MARGIN_BYTES
        )

    def _limits_hold(self) -> np.ndarray:
        truth, load = self._truth, self.load
        return (
            (truth.ttft_p95_s <= load.ttft_s)
            & (truth.tpot_p95_s <= load.tpot_s)
            & (truth.hbm_peak_bytes <= DEVICE_BYTES)
            & (truth.link_busy_frac <= MAX_LINK_BUSY)
            & (truth.attention_recall >= self._floor)
        )


def _rows(truth: Truth) -> list[dict[str, float]]:
    """The figures of each point, as plain numbers."""
    names = [item.name for item in fields(Truth)]
    columns = [getattr(truth, name).tolist() for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _settings(space: SearchSpace, points: Sequence[Point]) -> Settings:
    rungs = [np.array(ladder.rungs, dtype=float) for ladder in space.ladders]
    table = np.array(points)
    return Settings(**{n: rungs[i][table[:, i]] for i, n in enumerate(space.names)})
