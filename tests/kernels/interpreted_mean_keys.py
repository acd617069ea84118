"""Selections by mean keys, and these, under Triton's interpreter; run by test_interpreter.py."""

import pytest
import torch

from sparsed.kernels import mean_keys, reference_mean_keys, summarise

SHAPES = [
    {},
    {"requests": 1, "group": 7, "dim": 80, "num_dims": 48, "frame_pages": 4},
    {"group": 4, "dim": 128, "num_dims": 32, "frame_pages": 8, "layers": 3},
    {"heads": 3, "group": 1, "dim": 16, "num_dims": 16, "frame_pages": 1},
    {"row_frames": 40, "requests": 2},  # more pages than a tile
    {"dim": 8, "num_dims": 8, "frame_pages": 2},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("seed", "shape"), list(enumerate(SHAPES)), ids=str)
def test_selection(cases, shape, dtype, seed):
    case = cases.mean_keys(**shape, dtype=dtype, seed=seed)
    got_BHK = cases.selected_by(mean_keys._launch, case)
    assert all(cases.fair_selections(got_BHK, cases.logits_of_mean_keys(case), slack=1e-4))
    twins_BHK = cases.selected_by(reference_mean_keys.select_by_mean_keys, case)
    assert torch.equal(got_BHK, twins_BHK)


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
    expected = cases.summarised_by(reference_mean_keys.summarise_pages, case)
    got = cases.summarised_by(summarise._launch, case)
    assert cases.same_summaries(got, expected, per_frame=case["pages_per_frame"])
    assert (got != 77).any() == bool(len(case["page_rows_M"]))
