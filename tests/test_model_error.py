"""The error of the predictive model against the committed measurements stays what the docs say."""

from __future__ import annotations

from dataclasses import astuple

import model_error
import model_rows
import pytest

from sparsed.controller.plan.gpus import GPUS
from sparsed.tuner.roofline import ENGINE_COSTS


def test_every_committed_step_is_within_five_percent() -> None:
    steps = [*model_rows.dense_steps(), *model_rows.residency_steps(look_ahead=False)]
    assert len(steps) == 34
    assert all(0.95 <= ratio <= 1.05 for ratio in model_error.ratios(steps))


def test_rows_that_nothing_was_fitted_to_are_within_ten_percent() -> None:
    steps = [*model_rows.dense_steps(), *model_rows.residency_steps(look_ahead=False)]
    apart = [ratio for found in model_error.held_out(steps).values() for ratio in found]
    ahead = model_error.ratios(model_rows.residency_steps(look_ahead=True))
    others = [item for item in model_rows.figures() if not item.fitted]
    told = [item.predicted / item.measured for item in others]
    assert all(0.9 <= ratio <= 1.1 for ratio in (*apart, *ahead, *told))


def test_the_constants_are_those_of_the_fit() -> None:
    steps = [*model_rows.dense_steps(), *model_rows.residency_steps(look_ahead=False)]
    fitted = model_error.fit(steps, prompt_frac=model_error.fit_prompt_frac())
    assert astuple(ENGINE_COSTS) == pytest.approx(astuple(fitted), rel=0.005)


def test_the_rates_of_the_h100_are_those_measured() -> None:
    kernels = model_rows.read("h100-kernels.json")["ceilings"]
    rates = GPUS["h100"].rates
    assert rates.copy_bytes_per_s == pytest.approx(kernels["copy"], rel=0.005)
    assert rates.matmul_flop_per_s == pytest.approx(kernels["matmul"], rel=0.005)
    link = model_rows.figures()[-1]
    assert link.predicted == pytest.approx(link.measured, rel=0.005)
