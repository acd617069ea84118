"""Estimates of pages from mean keys in few bits: the twin, and on a GPU the kernel."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsed.kernels import reference_estimate
from sparsed.kernels.estimate import estimate_pages, row_bytes

SHAPES = [
    {},
    {"requests": 1, "group": 7, "dim": 80, "num_dims": 44, "frame_pages": 4},
    {"group": 4, "dim": 128, "num_dims": 32, "frame_pages": 8, "layers": 3},
    {"heads": 3, "group": 1, "num_dims": 64, "frame_pages": 1},
]
LARGE = {"requests": 8, "heads": 8, "group": 4, "dim": 128, "row_frames": 64}


def to_gpu(case):
    tensors = {k: v.cuda() for k, v in case.items() if isinstance(v, torch.Tensor)}
    return case | tensors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimate(cases, shape):
    case = cases.estimate(**shape)
    got = cases.estimated_by(estimate_pages, case)
    expected = cases.naive_estimate(**case).float()
    assert_close(got, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert not got.isnan().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer", 2),
        ("pages_per_frame", 8),
        ("rows_B", torch.zeros(3, dtype=torch.int64)),
        ("basis_HDR", torch.zeros(2, 64, 42)),
        ("out_HGX", torch.zeros(2, 4, 500)),
        ("q_BHGD", torch.zeros(3, 2, 64, 3).transpose(2, 3)),
    ],
)
def test_what_does_not_fit_is_refused(cases, name, value):
    with pytest.raises(AssertionError):
        estimate_pages(**cases.estimate() | {name: value})


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e3]))
def test_packed_means_are_half_a_step_off(seed, scale):
    means_NR = scale * torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
    means_NR[0] = 0.0
    codes, scales_N = reference_estimate.pack_means(means_NR)
    assert codes.shape == (20, 4) and scales_N.dtype == torch.float16
    row_Y = torch.cat((codes.T.flatten(), scales_N.view(torch.uint8)))
    read_NR = reference_estimate.read_means(row_Y[None, None], pages_per_frame=20)[0]
    step_N1 = scales_N.float()[:, None]
    assert ((read_NR - means_NR).abs() <= 0.51 * step_N1).all()
    assert (read_NR[0] == 0.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_estimate_on_a_gpu(cases, shape, dtype):
    """Queries and basis are multiplied in 10 bits."""
    case = cases.estimate(**shape, dtype=dtype)
    expected = cases.estimated_by(estimate_pages, case)
    got = cases.estimated_by(estimate_pages, to_gpu(case)).cpu()
    size = float(expected.nan_to_num().abs().max())
    assert_close(got, expected, atol=4e-3 * size, rtol=0, equal_nan=True)


@pytest.mark.gpu
def test_estimate_in_a_graph(cases):
    """Lengths, rows and places change between replays."""
    case = to_gpu(cases.estimate(**LARGE))
    estimate_pages(**case)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        estimate_pages(**case)
    for seed in range(1, 3):
        other = cases.estimate(**LARGE, seed=seed)
        for name in ("q_BHGD", "rows_B", "num_full_B", "first_B"):
            case[name].copy_(other[name])
        expected = cases.estimated_by(estimate_pages, case)
        case["out_HGX"].fill_(float("nan"))
        graph.replay()
        width = min(expected.shape[-1], case["out_HGX"].shape[-1])
        assert_close(case["out_HGX"][..., :width], expected[..., :width], equal_nan=True)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize(("requests", "row_frames"), [(1, 256), (24, 256), (4, 1024)])
def test_estimate_speed(cases, requests, row_frames):
    shape = LARGE | {"requests": requests, "row_frames": row_frames, "layers": 1}
    case = to_gpu(cases.estimate(**shape, dtype=torch.bfloat16))
    case["num_full_B"].fill_(min(int(case["num_full_B"].max()), row_frames * 16))
    case["first_B"].copy_(torch.arange(requests) * row_frames * 16)
    case["out_HGX"] = torch.empty(8, 4, requests * row_frames * 16, device="cuda")
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        estimate_pages(**case)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    num_bytes = requests * 8 * row_frames * row_bytes(16, 40)
    seconds = statistics.median(times)
    print(f"{requests} x {row_frames * 16} pages: {num_bytes / seconds / 1e9:.0f} GB/s")
    assert seconds < 1e-2
