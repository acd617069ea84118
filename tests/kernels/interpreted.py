"""Every kernel, launched on CPU tensors under Triton's interpreter; run by test_interpreter.py."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparsed.kernels import (
    attend,
    bounds,
    checksum,
    copy,
    gate,
    merge,
    norm,
    reference,
    reference_select,
    resident,
    rotate,
    sample,
    score,
    select,
    store,
)


def copy_by_kernel(
    dst_RX: Tensor,
    src_RX: Tensor,
    dst_rows: list[int],
    src_rows: list[int],
    *,
    count: Tensor | None = None,
    tile_bytes: int = 8192,
):
    rows = {"dst_rows_M": torch.tensor(dst_rows), "src_rows_M": torch.tensor(src_rows)}
    expected_RX = dst_RX.clone()
    reference.copy_pages(expected_RX, src_RX, count=count, **rows)
    copy._launch(dst_RX, src_RX, programs=2, count=count, tile_bytes=tile_bytes, **rows)
    assert torch.equal(dst_RX, expected_RX)


@pytest.mark.parametrize("width", [8, 24, 4100])
def test_copy(cases, width):
    copy_by_kernel(
        cases.random(7, width, seed=1), cases.random(9, width), [6, 0, 3, 2, 5], [8, -1, 0, 8, 4]
    )


@pytest.mark.parametrize("tile_bytes", [8192, 65536])
def test_copy_of_more_rows_than_a_tile(cases, tile_bytes):
    rows = torch.randperm(2500).tolist()
    dst_RX, src_RX = cases.random(2500, 8, seed=1), cases.random(2500, 8)
    copy_by_kernel(dst_RX, src_RX, rows, sorted(rows), tile_bytes=tile_bytes)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [-1, 0, 1, 3, 99])
@pytest.mark.parametrize("width", [24, 4100])
def test_copy_of_as_many_rows_as_the_device_says(cases, width, count, dtype):
    rows = [6, 0, 3, 2, 5], [8, 1, 0, -1, 4]
    dst_RX, src_RX = cases.random(7, width, seed=1), cases.random(9, width)
    copy_by_kernel(dst_RX, src_RX, *rows, count=torch.tensor(count, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 24, 4200])
def test_checksum(cases, width, dtype):
    store_RX = cases.random(9, width, dtype=dtype)
    rows_M = torch.cat((torch.randperm(9), torch.tensor([-1, 3])))
    expected_M = reference.page_checksums(store_RX, rows_M=rows_M)
    assert torch.equal(checksum._launch(store_RX, rows_M=rows_M), expected_M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 80])
def test_store(cases, dim, dtype):
    arena_NTCD = cases.random(11, 8, 2, dim, dtype=dtype)
    kv_BHCD = cases.random(3, 2, 2, dim, dtype=dtype, seed=1)
    tokens = {
        "slots_BH": torch.tensor([[4, 10], [-1, 0], [2, -1]], dtype=torch.int32),
        "offsets_B": torch.tensor([0, 7, 3], dtype=torch.int32),
        "k_BHD": kv_BHCD[:, :, 0],
        "v_BHD": kv_BHCD[:, :, 1],
    }
    expected_NTCD = arena_NTCD.clone()
    reference.store_tokens(expected_NTCD, **tokens)
    store._launch(arena_NTCD, **tokens)
    assert torch.equal(arena_NTCD, expected_NTCD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("minmax", [True, False])
@pytest.mark.parametrize("dim", [64, 80])
def test_bounds(cases, dim, minmax, dtype):
    pages_MTCD = cases.random(3, 8, 2, dim, dtype=dtype)
    assert_close(
        bounds._launch(pages_MTCD, minmax=minmax), reference.page_bounds(pages_MTCD, minmax=minmax)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "frame_pages"), [(16, 4), (40, 1), (8, 16)])
def test_score(cases, dim, frame_pages, dtype):
    query_BHE = cases.split_query(cases.random(2, 2, dim, dtype=dtype))
    summaries_FXE = cases.random(9, frame_pages, 2 * dim, dtype=dtype, seed=1)
    rows_BHF = torch.tensor([[[3, 0, 8], [-1, 7, 2]], [[5, 5, -1], [-1, -1, -1]]])
    got = score._launch(query_BHE, summaries_FXE, rows_BHF=rows_BHF, scales_FX=None)
    assert_close(
        got,
        reference.score_pages(query_BHE, summaries_FXE, rows_BHF=rows_BHF),
        atol=20 * cases.tolerance[dtype],
        rtol=cases.tolerance[dtype],
    )


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "frame_pages"), [(16, 4), (40, 1), (12, 16), (20, 3)])
def test_score_of_8_bits(cases, dim, frame_pages, dtype, scale_dtype):
    query_BHE = cases.split_query(cases.random(2, 2, dim, dtype=dtype))
    summaries_FXE, scales_FX = cases.int8_bounds(9, frame_pages, dim, dtype=scale_dtype)
    rows_BHF = torch.tensor([[[3, 0, 8], [-1, 7, 2]], [[5, 5, -1], [-1, -1, -1]]])
    stored = {"rows_BHF": rows_BHF, "scales_FX": scales_FX}
    got = score._launch(query_BHE, summaries_FXE, **stored)
    expected = reference.score_pages(query_BHE, summaries_FXE, **stored)
    assert_close(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"dim": 80, "group": 1, "page_size": 16, "columns": 3},
        {"dtype": torch.float16, "dim": 16, "group": 17, "heads": 1},
        {"dim": 32, "columns": 1, "absent_frac": 0.0},
        {"dim": 16, "heads": 1, "page_size": 128, "columns": 5},  # three splits
        {"dim": 16, "absent_frac": 1.0, "columns": 33},  # nothing there, in two splits
        {"dtype": torch.float16, "dim": 16, "heads": 1, "page_size": 32, "columns": 20},
        {"heads": 1, "columns": 30},  # four tiles in a split
        {"dim": 16, "heads": 1, "requests": 1, "page_size": 128, "columns": 67},  # 34 splits
    ],
    ids=str,
)
def test_attend(cases, shape):
    case = cases.attend(**shape)
    tolerance = cases.tolerance[case["arena_NTCD"].dtype]
    assert_close(
        attend._launch(**case), reference.attend_pages(**case), atol=tolerance, rtol=tolerance
    )


ODD_LENGTHS = (300, 128, 1, 0, 127, 129)


@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": ODD_LENGTHS},
        {"lengths": ODD_LENGTHS, "dtype": torch.float16, "dim": 16, "group": 7, "page_size": 8},
        {"lengths": (0, 127, 3, 129), "queries": 3, "dim": 80, "group": 1, "page_size": 128},
        {"lengths": (8, 135, 0), "queries": 8, "dim": 80, "heads": 1, "group": 7},  # two of lines
        {"lengths": (300,), "queries": 8, "dim": 16, "heads": 1, "dtype": torch.float16},
        {"lengths": (9, 300), "queries": 8, "dim": 16, "heads": 1, "group": 24},  # and four
        {"lengths": (2200, 130), "dim": 16, "heads": 1, "split_tokens": 128},  # 18 items in two
        {"lengths": (300, 128, 640), "dim": 16, "programs": 1, "split_tokens": 128},
        {"lengths": (300, 128, 640), "dim": 16, "programs": 99, "split_tokens": 512},
        {"lengths": (0, 0)},
    ],
    ids=str,
)
def test_resident(cases, shape):
    case = cases.resident(**shape)
    tolerance = cases.tolerance[case["arena_NTCD"].dtype]
    got = resident._launch(**case)
    del case["programs"]
    case["slots_MHP"] = case.pop("page_slot_MLHP")[:, case.pop("layer")]
    assert_close(got, reference.attend_resident(**case), atol=tolerance, rtol=tolerance)


def test_resident_does_not_depend_on_the_batch(cases):
    case = cases.resident(lengths=(300, 1, 0, 640, 129), dim=16, split_tokens=128)
    o_NHD = resident._launch(**case)
    case["plan"] = cases.resident_plan(
        case["plan"].rows_B.tolist()[3:4], [640], split_tokens=128, max_items=5
    )
    case["q_NHD"] = case["q_NHD"][3:4]
    assert torch.equal(resident._launch(**case), o_NHD[3:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "norm"), [(16, True), (80, False), (80, True)])
def test_rotate(cases, dim, norm, dtype):
    case = cases.rotate(dim=dim, norm=norm, dtype=dtype)
    expected_NHD = reference.rotate_heads(**case)
    got_NHD = rotate._launch(**case)
    assert got_NHD is case["heads_NHD"]
    assert_close(got_NHD, expected_NHD, atol=cases.tolerance[dtype], rtol=cases.tolerance[dtype])
    case = cases.rotate(dim=dim, norm=norm, dtype=dtype)
    before_NHD = case["heads_NHD"].clone()
    first_NFD = torch.full_like(expected_NHD[:, :2], 7).contiguous()
    got_NHD = rotate._launch(**case, first_NFD=first_NFD)
    assert torch.equal(got_NHD[:, :2], before_NHD[:, :2])
    joined_NHD = torch.cat((first_NFD, got_NHD[:, 2:]), dim=1)
    assert_close(joined_NHD, expected_NHD, atol=cases.tolerance[dtype], rtol=cases.tolerance[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 1024, 1100])
def test_silu_mul(cases, width, dtype):
    gate_up_NF = 4 * cases.random(3, 2 * width, dtype=dtype)
    tolerance = cases.tolerance[dtype]
    assert_close(
        gate._launch(gate_up_NF), reference.silu_mul(gate_up_NF), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [{}, {"dim": 80, "group": 1}, {"heads": 1, "requests": 1}])
def test_merge(cases, shape, dtype):
    states = cases.merge(dtype=dtype, **shape)
    shape = states[0].shape
    for out_dtype in (torch.float32, torch.bfloat16):
        got, expected = (
            torch.empty(shape[2], *shape[:2], shape[3], dtype=out_dtype).permute(1, 2, 0, 3)
            for _ in range(2)
        )
        lse = merge._launch(*states, o_BHGD=got)
        assert_close(lse, reference.merge_states(*states, o_BHGD=expected), atol=2e-5, rtol=2e-5)
        tolerance = cases.tolerance[out_dtype]
        assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 80, 1030])
def test_rms_norm(cases, width, dtype):
    x_ND, weight_D = cases.random(3, width, dtype=dtype), cases.random(width, dtype=dtype, seed=1)
    assert_close(
        norm._launch(x_ND, weight_D, eps=1e-5), reference.rms_norm(x_ND, weight_D, eps=1e-5)
    )


def test_the_numbers_of_draws_are_those_of_numpy(cases):
    _, plan = cases.draw(rows=200, vocab=1)
    plan.index_B[:2] = torch.tensor([0, 2**31 - 2])
    got_B = cases.uniforms(plan.key_4B, plan.index_B)
    assert got_B.tolist() == cases.numpy_uniforms(plan)


# Lanes that are masked out compute -inf * 0.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize(("vocab", "tile"), [(1, 64), (7, 64), (128, 64), (150, 64), (3000, 2048)])
def test_draws(cases, vocab, tile, spread, ties):
    logits_BV, plan = cases.draw(rows=8, vocab=vocab, spread=spread, ties=ties, seed=vocab)
    got_B = sample._launch(logits_BV, plan, tile=tile)
    assert torch.equal(got_B, reference.draw_tokens(logits_BV, plan))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draws_of_no_number(cases, temperature):
    logits_BV = torch.full((4, 100), float("nan"))
    logits_BV[1], logits_BV[2, 70], logits_BV[3, 5] = float("-inf"), -9.0, float("inf")
    plan = cases.draw_plan(
        key=[1] * 4, temperature=[temperature] * 4, top_p=[0.5] * 4, min_p=[0.1] * 4, top_k=[3] * 4
    )
    tokens = sample._launch(logits_BV, plan, tile=64).tolist()
    assert (
        tokens[:3] == reference.draw_tokens(logits_BV[:3], plan_of(plan, 3)).tolist() == [0, 0, 70]
    )
    assert 0 <= tokens[3] < 100


def plan_of(plan: sample.DrawPlan, rows: int) -> sample.DrawPlan:
    return plan._make(part[..., :rows].contiguous() for part in plan)


SELECT_SHAPES = [
    {},
    {"group": 1, "heads": 1, "pages": (500, 499, 498), "columns": 300},
    {"group": 4, "pages": (128, 127, 65, 64, 63)},
    {"group": 6, "pages": (129, 3, 150), "columns": 1},
    {"group": 24, "heads": 1, "pages": (90,), "spread": 30.0},  # most pages count as 0
    {"pages": (70, 45, 43), "spread": 0.0},  # all alike: the search begins where it ends
    {"pages": (0, 1), "columns": 3},
]


@pytest.mark.parametrize("max_piece", [64, 8192])
@pytest.mark.parametrize(("seed", "shape"), list(enumerate(SELECT_SHAPES)), ids=str)
def test_select(cases, seed, shape, max_piece):
    def launch(**case):
        select._launch(**case, max_piece=max_piece)

    repeated = cases.select(**shape, ties=True, seed=seed)
    expected_BHK = cases.selected_by(reference_select.select_pages, repeated)
    assert torch.equal(cases.selected_by(launch, repeated), expected_BHK)
    case = cases.select(**shape, seed=seed)
    assert all(cases.fair_selections(cases.selected_by(launch, case), case, slack=1e-5))


# -inf - -inf is not a number, and that is what is tested.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("max_piece", [64, 8192])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_select_without_broken_heads(cases, broken, max_piece):
    case = cases.select(pages=(200,), ties=True)
    case["count_B"][:] = 30
    head_X = case["logits_BHGP"][0, 0, 1, :200]
    head_X[slice(None) if broken == float("-inf") else slice(70, 71)] = broken
    case["logits_BHGP"][0, 1] = broken
    expected_BHK = cases.selected_by(reference_select.select_pages, case)
    got_BHK = cases.selected_by(lambda **case: select._launch(**case, max_piece=max_piece), case)
    assert torch.equal(got_BHK, expected_BHK)
    num_first = 30 - case["recent_pages"]
    assert got_BHK[0, 1, :num_first].tolist() == list(range(num_first))  # no reason to choose
    assert got_BHK[0, 0, :num_first].tolist() != list(range(num_first))
