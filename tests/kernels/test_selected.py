"""Attention to selected pages in two parts: the twins, on a GPU the kernels."""

import pytest
import torch
from torch.testing import assert_close

from sparsed.kernels import reference_selected, selected

SHAPES = [
    {"requests": 3, "columns": 7},
    {"requests": 2, "heads": 1, "group": 4, "dim": 128, "columns": 90},
    {"requests": 5, "heads": 8, "group": 4, "dim": 128, "columns": 256},
    {"requests": 3, "group": 1, "dim": 80, "columns": 2, "page_size": 32},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_two_parts(cases, shape, seed):
    case = cases.attend(**shape, seed=seed)
    got = cases.attended_by(
        reference_selected.attend_hits, reference_selected.attend_rest, case, seed=seed
    )
    for mine, theirs in zip(got, cases.naive_attend(**case), strict=True):
        assert_close(mine.double(), theirs[:-1], atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_two_parts_on_a_gpu(cases, shape, dtype):
    case = cases.attend(**shape, dtype=dtype)
    expected = cases.naive_attend(**case)
    tensors = {k: v.cuda() for k, v in case.items() if isinstance(v, torch.Tensor)}
    got = cases.attended_by(selected._launch_hits, selected._launch_rest, case | tensors, seed=0)
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine.cpu().double(), theirs[:-1], atol=cases.tolerance[dtype], rtol=2e-2)
