"""Selections by mean keys in few bits, and these: the twins, on a GPU the kernels."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsed.kernels import reference_mean_keys
from sparsed.kernels.mean_keys import select_by_mean_keys
from sparsed.kernels.summarise import summarise_pages

SHAPES = [
    {},
    {"requests": 1, "group": 7, "dim": 80, "num_dims": 48, "frame_pages": 4},
    {"group": 4, "dim": 128, "num_dims": 32, "frame_pages": 8, "layers": 3},
    {"heads": 3, "group": 1, "num_dims": 64, "frame_pages": 1},
]
LARGE = {"requests": 8, "heads": 8, "group": 4, "dim": 128, "row_frames": 64, "columns": 99}


def to_gpu(case):
    tensors = {k: v.cuda() for k, v in case.items() if isinstance(v, torch.Tensor)}
    return case | tensors


def median_s(run):
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selection(cases, shape):
    case = cases.mean_keys(**shape)
    got_BHK = cases.selected_by(select_by_mean_keys, case)
    assert all(cases.fair_selections(got_BHK, cases.logits_of_mean_keys(case), slack=1e-4))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer", 2),
        ("pages_per_frame", 8),
        ("rows_B", torch.zeros(3, dtype=torch.int64)),
        ("basis_HDR", torch.zeros(2, 64, 42)),
        ("out_BHK", torch.zeros(2, 2, 21, dtype=torch.int32)),
        ("count_B", torch.zeros(2, dtype=torch.int32)),
        ("q_BHGD", torch.zeros(3, 2, 64, 3).transpose(2, 3)),
    ],
)
def test_what_does_not_fit_is_refused(cases, name, value):
    with pytest.raises(AssertionError):
        select_by_mean_keys(**cases.mean_keys() | {name: value})


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e3]))
def test_packed_means_are_half_a_step_off(seed, scale):
    means_NR = scale * torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
    means_NR[0] = 0.0
    codes, scales_N = reference_mean_keys.pack_means(means_NR)
    assert codes.shape == (20, 4) and scales_N.dtype == torch.float16
    words = codes.view(20, -1, 4).transpose(0, 1)
    row_Y = torch.cat((words.flatten(), scales_N.view(torch.uint8)))
    read_NR = reference_mean_keys.read_means(row_Y[None, None], pages_per_frame=20)[0]
    step_N1 = scales_N.float()[:, None]
    assert ((read_NR - means_NR).abs() <= 0.51 * step_N1).all()
    assert (read_NR[0] == 0.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_selection_on_a_gpu(cases, shape, dtype):
    """Few levels of a query lie where rounding decides; then a page may be off by one of them."""
    case = cases.mean_keys(**shape, dtype=dtype)
    got_BHK = cases.selected_by(select_by_mean_keys, to_gpu(case)).cpu()
    assert all(cases.fair_selections(got_BHK, cases.logits_of_mean_keys(case), slack=0.02))
    same = got_BHK == cases.selected_by(select_by_mean_keys, case)
    assert same.float().mean() > 0.98


@pytest.mark.gpu
def test_selection_in_a_graph(cases):
    """Lengths, rows and queries change between replays."""
    case = to_gpu(cases.mean_keys(**LARGE))
    select_by_mean_keys(**case)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_by_mean_keys(**case)
    for seed in range(1, 3):
        other = cases.mean_keys(**LARGE, seed=seed)
        for name in ("q_BHGD", "rows_B", "num_full_B", "count_B"):
            case[name].copy_(other[name])
        expected_BHK = cases.selected_by(select_by_mean_keys, case)
        graph.replay()
        assert torch.equal(cases.rising(case["out_BHK"]), expected_BHK)


SUMMARISED = [
    {"pages": 3000, "num_frames": 99},
    {"page_size": 128, "dim": 80, "num_dims": 32},
    {"page_size": 16, "dim": 128, "lanes": 7},
]


@pytest.mark.parametrize("shape", SUMMARISED, ids=str)
def test_summaries_are_read_back(cases, shape):
    """The means of the keys in the basis, half a step off at most; nothing else is written."""
    case = cases.summarise(**shape)
    per_frame, lanes = case["pages_per_frame"], len(case["basis_NDR"])
    store_SY = cases.summarised_by(summarise_pages, case)
    read_SPR = reference_mean_keys.read_means(store_SY[:, None], pages_per_frame=per_frame)
    for page_TCD, row in zip(case["pages_MTCD"], case["page_rows_M"].tolist(), strict=True):
        lane = row // per_frame % lanes
        mean_D = page_TCD[:, 0].mean(0) - case["centre_ND"][lane]
        exact_R = mean_D @ case["basis_NDR"][lane]
        off_R = read_SPR[row // per_frame, row % per_frame] - exact_R
        assert float(off_R.abs().max()) <= 0.51 * float(exact_R.abs().max()) / 7 + 1e-4
    untouched = store_SY.shape[0] * per_frame - len(case["page_rows_M"])
    assert int((store_SY == 77).sum()) >= untouched * (case["basis_NDR"].shape[2] // 2 + 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SUMMARISED, ids=str)
def test_summarise_on_a_gpu(cases, shape, dtype):
    case = cases.summarise(**shape, dtype=dtype)
    expected = cases.summarised_by(summarise_pages, case)
    got = cases.summarised_by(summarise_pages, to_gpu(case))
    assert cases.same_summaries(got, expected, per_frame=case["pages_per_frame"])


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize(("page_size", "pages"), [(8, 8192), (8, 16_384)])
def test_summarise_speed(cases, page_size, pages):
    """A chunk of a prompt in one layer, or a page of 64 requests in all lanes of an 8B shape."""
    shape = {"page_size": page_size, "pages": pages, "dim": 128, "lanes": 256, "num_frames": 8}
    case = to_gpu(cases.summarise(**shape, dtype=torch.bfloat16))
    seconds = median_s(lambda: summarise_pages(**case))
    print(f"summaries of {pages} pages of {page_size}: {seconds * 1e6:.0f} us")
    assert seconds < 1e-2
