"""Estimates and summaries of pages under Triton's interpreter; run by test_interpreter.py."""

import pytest
import torch
from torch.testing import assert_close

from sparsed.kernels import estimate, reference_estimate, summarise

SHAPES = [
    {},
    {"requests": 1, "group": 7, "dim": 80, "num_dims": 48, "frame_pages": 4},
    {"group": 4, "dim": 128, "num_dims": 32, "frame_pages": 8, "layers": 3},
    {"heads": 3, "group": 1, "dim": 16, "num_dims": 16, "frame_pages": 1},
    {"row_frames": 40, "requests": 2},  # more pages than a tile
    {"dim": 8, "num_dims": 8, "frame_pages": 2},
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimate(cases, shape, dtype, seed):
    case = cases.estimate(**shape, dtype=dtype, seed=seed)
    expected = cases.estimated_by(reference_estimate.estimate_pages, case)
    got = cases.estimated_by(estimate._launch, case)
    assert_close(got, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert not got.isnan().all()


SUMMARISED = [
    {},
    {"page_size": 128, "dim": 80, "num_dims": 32, "pages": 9},
    {"page_size": 16, "dim": 8, "num_dims": 8, "lanes": 1},
    {"page_size": 32, "dim": 128, "pages": 0},
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SUMMARISED, ids=str)
def test_summarise(cases, shape, dtype, seed):
    case = cases.summarise(**shape, dtype=dtype, seed=seed)
    case["page_rows_M"][-2:] = -1  # of nobody
    expected = cases.summarised_by(reference_estimate.summarise_pages, case)
    got = cases.summarised_by(summarise._launch, case)
    assert cases.same_summaries(got, expected, per_frame=case["pages_per_frame"])
    assert (got != 77).any() == bool(len(case["page_rows_M"]))
