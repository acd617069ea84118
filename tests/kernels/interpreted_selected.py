"""Attention to selected pages under Triton's interpreter; run by test_interpreter.py."""

import pytest
from torch.testing import assert_close

from sparsed.kernels import selected

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
