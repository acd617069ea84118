"""Attention to selected pages under Triton's interpreter; run by test_interpreter.py."""

import pytest
import torch
from torch.testing import assert_close

from sparsed.kernels import keep, reference_select, selected

SHAPES = [
    {"requests": 3, "columns": 7},
    {"requests": 2, "heads": 1, "group": 4, "dim": 128, "columns": 90},  # several splits
    {"requests": 3, "group": 1, "dim": 80, "columns": 2, "page_size": 32},
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_two_parts(cases, shape, seed):
    case = cases.attend(**shape, seed=seed)
    got = cases.attended_by(selected._launch_hits, selected._launch_rest, case, seed=seed)
    for mine, theirs in zip(got, cases.naive_attend(**case), strict=True):
        assert_close(mine.double(), theirs[:-1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("width", [3, 600])
def test_keep(width):
    numbers = torch.Generator().manual_seed(width)
    kept_RHC = torch.randint(0, 99, (6, 2, 700), generator=numbers, dtype=torch.int32)
    pages_BHK = torch.randint(0, 99, (4, 2, width), generator=numbers, dtype=torch.int32)
    lists = [[5, 0, 3, 1], [2, width, width - 1, 0], [0, 1, 0, 1]]
    rows_B, count_B, keeps_B = (torch.tensor(values, dtype=torch.int32) for values in lists)
    expected = pages_BHK.clone(), kept_RHC.clone()
    given = {"rows_B": rows_B, "count_B": count_B, "keeps_B": keeps_B}
    reference_select.keep_pages(*expected, **given)
    keep._launch(pages_BHK, kept_RHC, **given)
    assert torch.equal(pages_BHK, expected[0]) and torch.equal(kept_RHC, expected[1])
    assert not torch.equal(pages_BHK[1], kept_RHC[1, :, :width])  # others' rows stay as they were
