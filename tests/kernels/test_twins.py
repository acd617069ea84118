"""The twins, and the wrappers on CPU tensors, against loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsed.kernels import reference
from sparsed.kernels.attend import attend_pages
from sparsed.kernels.bounds import page_bounds
from sparsed.kernels.checksum import page_checksums
from sparsed.kernels.copy import copy_pages
from sparsed.kernels.gate import silu_mul
from sparsed.kernels.merge import merge_states
from sparsed.kernels.resident import attend_resident
from sparsed.kernels.rotate import rotate_heads
from sparsed.kernels.sample import draw_tokens
from sparsed.kernels.score import score_pages
from sparsed.kernels.select import select_pages
from sparsed.kernels.store import store_tokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
few = settings(max_examples=25)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@few
@given(rows=st.lists(st.integers(-1, 8), max_size=7), seed=st.integers(0, 99))
def test_copy_moves_the_wanted_rows_and_no_other(cases, rows, seed):
    dst_RX, src_RX = cases.random(7, 6, seed=seed), cases.random(9, 6, seed=seed + 1)
    plan = {
        "dst_rows_M": torch.randperm(7)[: len(rows)],
        "src_rows_M": torch.tensor(rows, dtype=torch.int64),
    }
    expected_RX = cases.naive_copy(dst_RX, src_RX, **plan)
    copy_pages(dst_RX, src_RX, **plan)
    assert torch.equal(dst_RX, expected_RX)


def naive_checksum(row: torch.Tensor) -> int:
    """Python's integers, cut to 64 bits at the end."""
    total = 0
    for place, word in enumerate(row.view(torch.int32).tolist()):
        mixed = (place << 32 | word % 2**32) * 0x2545F4914F6CDD1D % 2**64
        total += (mixed ^ mixed >> 32) * 0x5851F42D4C957F2D
    return (total + 2**63) % 2**64 - 2**63 or 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums(cases, dtype):
    store_RX = cases.random(5, 4, 12, dtype=dtype)
    got_M = page_checksums(store_RX, rows_M=torch.tensor([3, -1, 0, 3]))
    expected = [naive_checksum(store_RX[row].flatten()) for row in (3, 0)]
    assert got_M.tolist() == [expected[0], 0, expected[1], expected[0]]
    assert page_checksums(store_RX, rows_M=torch.tensor([], dtype=torch.int64)).shape == (0,)


@few
@given(seed=st.integers(0, 999), bit=st.integers(0, 30), word=st.integers(0, 63))
def test_checksums_notice_any_bit_and_any_swap(cases, seed, bit, word):
    store_RX = cases.random(3, 64, seed=seed)
    store_RX[1:] = store_RX[0]
    store_RX.view(torch.int32)[1, word] ^= 1 << bit
    store_RX[2, [word, word - 1]] = store_RX[0, [word - 1, word]]
    whole, flipped, swapped = page_checksums(store_RX, rows_M=torch.arange(3)).tolist()
    assert len({whole, flipped, swapped}) == 3


@few
@given(
    requests=st.integers(1, 4),
    heads=st.integers(1, 3),
    page_size=st.sampled_from([8, 32]),
    seed=st.integers(0, 99),
)
def test_store_writes_one_token_a_lane(cases, requests, heads, page_size, seed):
    arena_NTCD = cases.random(15, page_size, 2, 5, seed=seed)
    kv_BHCD = cases.random(requests, heads, 2, 5, seed=seed + 1)
    tokens = {
        "slots_BH": cases.random_slots(15, requests, heads, absent_frac=0.3, seed=seed),
        "offsets_B": (torch.arange(requests) * 7 + seed).remainder(page_size).int(),
        "k_BHD": kv_BHCD[:, :, 0],
        "v_BHD": kv_BHCD[:, :, 1],
    }
    expected_NTCD = cases.naive_store(arena_NTCD, **tokens)
    store_tokens(arena_NTCD, **tokens)
    assert torch.equal(arena_NTCD, expected_NTCD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("minmax", [True, False])
@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128])
def test_bounds(cases, page_size, minmax, dtype):
    pages_MTCD = cases.random(3, page_size, 2, 20, dtype=dtype)
    got = page_bounds(pages_MTCD, minmax=minmax)
    assert got.dtype == dtype
    close(got, cases.naive_bounds(pages_MTCD, minmax=minmax), cases.tolerance[dtype])


def test_no_pages_have_no_bounds():
    assert page_bounds(torch.empty(0, 8, 2, 4), minmax=True).shape == (0, 2, 4)


def test_minmax_scores_bound_every_key_of_the_page(cases):
    pages_MTCD, q_D = cases.random(6, 8, 2, 12), cases.random(12, seed=1)
    summaries_FXE = page_bounds(pages_MTCD, minmax=True).reshape(2, 3, 24)
    rows_BHF = torch.tensor([[[1, 0]]])
    score_P = score_pages(cases.split_query(q_D[None, None]), summaries_FXE, rows_BHF=rows_BHF)
    best_P = (pages_MTCD[:, :, 0] @ q_D).amax(1)[[3, 4, 5, 0, 1, 2]]
    assert (score_P[0, 0] >= best_P - 1e-5).all()


@few
@given(
    requests=st.integers(1, 3),
    heads=st.integers(1, 3),
    frames=st.integers(1, 4),
    frame_pages=st.sampled_from([1, 2, 4, 16]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_score(cases, requests, heads, frames, frame_pages, dtype, seed):
    query_BHE = cases.split_query(cases.random(requests, heads, 10, dtype=dtype, seed=seed))
    summaries_FXE = cases.random(36, frame_pages, 20, dtype=dtype, seed=seed + 1)
    rows_BHF = cases.random_slots(36, requests, heads, frames, absent_frac=0.2, seed=seed).long()
    got = score_pages(query_BHE, to_bounds(summaries_FXE), rows_BHF=rows_BHF)
    expected = cases.naive_score(query_BHE, to_bounds(summaries_FXE), rows_BHF=rows_BHF)
    close(got, expected, 8 * cases.tolerance[dtype])


@few
@given(
    requests=st.integers(1, 3),
    heads=st.integers(1, 3),
    frame_pages=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_score_of_8_bits(cases, requests, heads, frame_pages, dtype, scale_dtype, seed):
    query_BHE = cases.split_query(cases.random(requests, heads, 10, dtype=dtype, seed=seed))
    summaries_FXE, scales_FX = cases.int8_bounds(36, frame_pages, 10, dtype=scale_dtype, seed=seed)
    rows_BHF = cases.random_slots(36, requests, heads, 4, absent_frac=0.2, seed=seed).long()
    got = score_pages(query_BHE, summaries_FXE, rows_BHF=rows_BHF, scales_FX=scales_FX)
    real_FXE = summaries_FXE.double() * scales_FX.double()[..., None]
    close(got, cases.naive_score(query_BHE, real_FXE, rows_BHF=rows_BHF), 1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda bounds, scales: (bounds, None),
        lambda bounds, scales: (bounds.float(), scales),
        lambda bounds, scales: (bounds, scales.bfloat16()),
        lambda bounds, scales: (bounds, scales[:, :1]),
        lambda bounds, scales: (bounds, scales.t().contiguous().t()),
        lambda bounds, scales: (bounds.short(), scales),
    ],
)
def test_score_refuses_other_scales(cases, change):
    bounds, scales = change(*cases.int8_bounds(5, 4, 10, dtype=torch.float16))
    rows_BHF = torch.zeros(1, 1, 2, dtype=torch.int64)
    with pytest.raises(AssertionError):
        score_pages(torch.zeros(1, 1, 20), bounds, rows_BHF=rows_BHF, scales_FX=scales)


def to_bounds(summaries_FXE: torch.Tensor) -> torch.Tensor:
    """Upper not below lower, as page bounds are."""
    upper_FXD, lower_FXD = summaries_FXE.chunk(2, dim=-1)
    return torch.cat((upper_FXD.maximum(lower_FXD), upper_FXD.minimum(lower_FXD)), dim=-1)


@settings(max_examples=40)
@given(
    shape=st.fixed_dictionaries(
        {
            "requests": st.integers(1, 3),
            "heads": st.integers(1, 3),
            "group": st.sampled_from([1, 3, 8]),
            "dim": st.sampled_from([16, 20]),
            "columns": st.integers(1, 9),
            "page_size": st.sampled_from([8, 16, 32, 64, 128]),
            "dtype": st.sampled_from(DTYPES),
            "absent_frac": st.sampled_from([0.0, 0.3, 1.0]),
            "seed": st.integers(0, 99),
        }
    )
)
def test_attend(cases, shape):
    case = cases.attend(**shape)
    for got, expected in zip(attend_pages(**case), cases.naive_attend(**case), strict=True):
        assert got.dtype == torch.float32
        close(got, expected, cases.tolerance[shape["dtype"]])


def test_attend_to_an_empty_tail(cases):
    case = cases.attend(requests=1, columns=1, absent_frac=0.0)
    case["tail_tokens_B"].zero_()
    o_BHGD, lse_BHG = attend_pages(**case)
    assert (o_BHGD == 0).all() and (lse_BHG == -math.inf).all()


@few
@given(
    seed=st.integers(0, 99),
    first=st.integers(0, 6),
    absent_frac=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_merge_of_two_sets_is_attention_over_both(cases, seed, first, absent_frac):
    case = cases.attend(columns=6, absent_frac=absent_frac, seed=seed)
    whole = attend_pages(**case)
    slots_BHK = case.pop("slots_BHK")
    in_first_K = torch.arange(6) < first
    parts = [
        attend_pages(slots_BHK=slots_BHK.masked_fill(chosen_K, -1), **case)
        for chosen_K in (in_first_K, ~in_first_K)
    ]
    for got, expected in zip(merge_states(*parts[0], *parts[1]), whole, strict=True):
        assert_close(got, expected, atol=2e-5, rtol=2e-5)


@settings(max_examples=40)
@given(
    shape=st.fixed_dictionaries(
        {
            "lengths": st.lists(
                st.sampled_from([0, 8, 127, 128, 129, 300]), min_size=1, max_size=4
            ),
            "queries": st.sampled_from([1, 3, 8]),
            "heads": st.integers(1, 3),
            "group": st.sampled_from([1, 3, 8]),
            "dim": st.sampled_from([16, 20]),
            "page_size": st.sampled_from([8, 32, 128]),
            "dtype": st.sampled_from(DTYPES),
            "seed": st.integers(0, 99),
        }
    )
)
def test_resident(cases, shape):
    case = cases.resident(**shape)
    got = attend_resident(**case)
    assert got.dtype == shape["dtype"] and got.is_contiguous()
    close(got, cases.naive_resident(**case), cases.tolerance[shape["dtype"]])


def test_the_only_token_of_a_request_is_its_value(cases):
    case = cases.resident(lengths=(1,), heads=1, group=1)
    first_frame = case["frames_RF"][case["plan"].rows_B[0], 0]
    first_slot = case["page_slot_MLHP"][first_frame, case["layer"], 0, 0]
    assert_close(attend_resident(**case)[0, 0], case["arena_NTCD"][first_slot, 0, 1])


def test_resident_does_not_depend_on_the_split(cases):
    small, large = (cases.resident(lengths=(640,), split_tokens=split) for split in (128, 512))
    assert torch.equal(attend_resident(**small), attend_resident(**large))


def test_resident_attends_in_the_precision_of_the_arena(cases):
    case = cases.resident(dtype=torch.bfloat16)
    case["q_NHD"] = case["q_NHD"].float()
    got = attend_resident(**case)
    assert got.dtype == torch.float32
    close(got, cases.naive_resident(**case), cases.tolerance[torch.bfloat16])


def test_resident_refuses_a_request_shorter_than_its_queries(cases):
    with pytest.raises(AssertionError):
        attend_resident(**cases.resident(lengths=(300, 2), queries=3))


@few
@given(
    shape=st.fixed_dictionaries(
        {
            "tokens": st.integers(0, 5),
            "heads": st.integers(1, 4),
            "dim": st.sampled_from([2, 16, 80]),
            "norm": st.booleans(),
            "dtype": st.sampled_from(DTYPES),
            "seed": st.integers(0, 99),
        }
    )
)
def test_rotate(cases, shape):
    case = cases.rotate(**shape)
    before_NHD = case["heads_NHD"].clone()
    got = rotate_heads(**case)
    assert got.dtype == shape["dtype"] and torch.equal(case["heads_NHD"], before_NHD)
    expected = cases.naive_rotate(**case)
    close(got, expected, 2 * cases.tolerance[shape["dtype"]])
    num_first = shape["heads"] - 1
    first_NFD = torch.full_like(got[:, :num_first], 7).contiguous()
    rest_NHD = rotate_heads(**case, first_NFD=first_NFD)[:, num_first:]
    close(torch.cat((first_NFD, rest_NHD), dim=1), expected, 2 * cases.tolerance[shape["dtype"]])


def test_rotation_keeps_the_length_of_a_head(cases):
    case = cases.rotate(norm=False)
    assert_close(rotate_heads(**case).norm(dim=2), case["heads_NHD"].norm(dim=2))


@few
@given(
    rows=st.integers(0, 4),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_silu_mul(cases, rows, width, dtype, seed):
    gate_up_NF = 4 * cases.random(rows, 2 * width, dtype=dtype, seed=seed)
    got = silu_mul(gate_up_NF)
    assert got.dtype == dtype
    close(got, cases.naive_silu_mul(gate_up_NF), cases.tolerance[dtype])


def test_silu_mul_of_a_gate_far_from_zero():
    gate_up_NF = torch.tensor([[-200.0, 200.0, 3.0, 3.0]])
    assert torch.equal(silu_mul(gate_up_NF), torch.tensor([[-0.0, 600.0]]))


@few
@given(
    group=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_merge(cases, group, dtype, seed):
    states = cases.merge(group=group, dtype=dtype, seed=seed)
    for got, expected in zip(merge_states(*states), cases.naive_merge(*states), strict=True):
        assert got.dtype == torch.float32
        close(got, expected, 2e-5)


@few
@given(seed=st.integers(0, 2**32))
def test_the_numbers_of_draws_are_those_of_numpy(cases, seed):
    _, plan = cases.draw(rows=20, vocab=1, seed=seed)
    keys = [
        sum((word % 2**32) << 32 * i for i, word in enumerate(key))
        for key in plan.key_4B.T.tolist()
    ]
    got = [
        reference.philox_uniform(key, index=index)
        for key, index in zip(keys, plan.index_B.tolist(), strict=True)
    ]
    assert got == cases.numpy_uniforms(plan)


@settings(max_examples=60)
@given(
    shape=st.fixed_dictionaries(
        {
            "rows": st.integers(0, 20),
            "vocab": st.sampled_from([1, 7, 150, 3000]),
            "spread": st.sampled_from([0.0, 0.3, 3.0]),
            "ties": st.booleans(),
            "seed": st.integers(0, 2**32),
        }
    )
)
def test_draw(cases, shape):
    logits_BV, plan = cases.draw(**shape)
    tokens_B = draw_tokens(logits_BV, plan=plan)
    assert tokens_B.dtype == torch.int64
    assert all(cases.fair_draws(tokens_B, logits_BV, plan, slack=1e-9))


def test_a_draw_of_nothing_is_the_first_token(cases):
    logits_BV = torch.full((2, 9), -math.inf)
    logits_BV[1] = math.nan
    assert draw_tokens(logits_BV, plan=cases.draw_plan(key=[1, 2])).tolist() == [0, 0]


def test_a_draw_never_takes_what_is_impossible(cases):
    logits_BV = torch.zeros(300, 5)
    logits_BV[:, [0, 1, 4]] = torch.tensor([-math.inf, math.nan, -math.inf])
    tokens_B = draw_tokens(logits_BV, plan=cases.draw_plan(key=range(300)))
    assert set(tokens_B.tolist()) == {2, 3}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key_4B", lambda key_4B: key_4B.t().contiguous().t()),
        ("key_4B", lambda key_4B: key_4B[:2]),
        ("index_B", lambda index_B: index_B.long()),
        ("temperature_B", lambda temperature_B: temperature_B.double()),
        ("top_p_B", lambda top_p_B: top_p_B[:-1]),
        ("min_p_B", lambda min_p_B: min_p_B.repeat_interleave(2)[::2]),
        ("top_k_B", lambda top_k_B: top_k_B.float()),
    ],
)
def test_draw_refuses_what_its_kernel_cannot_read(cases, name, change):
    logits_BV, plan = cases.draw(rows=3)
    with pytest.raises(AssertionError):
        draw_tokens(logits_BV, plan=plan._replace(**{name: change(getattr(plan, name))}))
    for logits in (logits_BV.half(), logits_BV[:, ::2], logits_BV[:-1]):
        with pytest.raises(AssertionError):
            draw_tokens(logits, plan=plan)


def test_wrappers_refuse_what_kernels_cannot_read(cases):
    case = cases.attend()
    with pytest.raises(AssertionError):
        attend_pages(**{**case, "slots_BHK": case["slots_BHK"].long()})
    with pytest.raises(AssertionError):
        attend_pages(**{**case, "q_BHGD": case["q_BHGD"].transpose(0, 1)})
    with pytest.raises(AssertionError):
        page_bounds(torch.zeros(3, 8, 2, 4)[:, ::2], minmax=True)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q_NHD", lambda q_NHD: q_NHD.transpose(0, 1)),
        ("q_NHD", lambda q_NHD: q_NHD[..., :-1]),
        ("q_NHD", lambda q_NHD: q_NHD.repeat(9, 1, 1)),  # nine queries
        ("q_NHD", lambda q_NHD: q_NHD[:-1]),
        ("arena_NTCD", lambda arena_NTCD: arena_NTCD[:, ::2]),
        ("arena_NTCD", lambda arena_NTCD: arena_NTCD.repeat(1, 3, 1, 1)),  # pages of 96 tokens
        ("frames_RF", lambda frames_RF: frames_RF.long()),
        ("frames_RF", lambda frames_RF: frames_RF[:, ::2]),
        ("page_slot_MLHP", lambda page_slot_MLHP: page_slot_MLHP.long()),
        ("page_slot_MLHP", lambda page_slot_MLHP: page_slot_MLHP[:, :, ::2]),
        ("page_slot_MLHP", lambda page_slot_MLHP: page_slot_MLHP.flatten(2)),
        ("page_slot_MLHP", lambda page_slot_MLHP: page_slot_MLHP.repeat(1, 1, 1, 2)),  # of 64
        ("plan", lambda plan: plan._replace(lengths_B=plan.lengths_B.long())),
    ],
)
def test_resident_refuses_what_its_kernel_cannot_read(cases, name, change):
    case = cases.resident()
    case[name] = change(case[name])
    with pytest.raises(AssertionError):
        attend_resident(**case)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("heads_NHD", lambda heads_NHD: heads_NHD.transpose(0, 1).contiguous().transpose(0, 1)),
        ("heads_NHD", lambda heads_NHD: heads_NHD[..., ::2]),
        ("heads_NHD", lambda heads_NHD: heads_NHD.half()),
        ("cos_ND", lambda cos_ND: cos_ND[:-1]),
        ("sin_ND", lambda sin_ND: sin_ND.t().contiguous().t()),
        ("norm_HD", lambda norm_HD: norm_HD[0]),
        ("norm_HD", lambda norm_HD: norm_HD.double()),
    ],
)
def test_rotate_refuses_what_its_kernel_cannot_read(cases, name, change):
    case = cases.rotate()
    case[name] = change(case[name])
    with pytest.raises(AssertionError):
        rotate_heads(**case)


def test_silu_mul_and_merge_refuse_what_their_kernels_cannot_read(cases):
    with pytest.raises(AssertionError):
        silu_mul(torch.zeros(2, 5))
    with pytest.raises(AssertionError):
        silu_mul(torch.zeros(4, 2).t())
    o_a_BHGD, lse_a_BHG, o_b_BHGD, lse_b_BHG = cases.merge()
    with pytest.raises(AssertionError):
        merge_states(o_a_BHGD, lse_a_BHG, o_b_BHGD[:, :1], lse_b_BHG)
    with pytest.raises(AssertionError):
        merge_states(o_a_BHGD, lse_a_BHG[..., :1], o_b_BHGD, lse_b_BHG)
    with pytest.raises(AssertionError):
        merge_states(o_a_BHGD[..., ::2], lse_a_BHG, o_b_BHGD[..., ::2], lse_b_BHG)


@few
@given(
    pages=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    heads=st.integers(1, 2),
    group=st.integers(1, 6),
    columns=st.integers(1, 50),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_select(cases, seed, spread, pages, **shape):
    shape |= {"pages": [*pages, 60], "spread": spread, "seed": seed}
    repeated = cases.select(**shape, ties=True)
    assert torch.equal(cases.selected_by(select_pages, repeated), cases.naive_select(**repeated))
    case = cases.select(**shape)
    assert all(cases.fair_selections(cases.selected_by(select_pages, case), case, slack=1e-6))


def test_select_breaks_ties_by_id_and_keeps_what_is_forced(cases):
    case = cases.select(pages=(10,), group=2, columns=6) | {"sink_pages": 1, "recent_pages": 2}
    case["logits_BHGP"] = torch.tensor([0.0, 0.0, 1.0, 0.0]).repeat(1, 2, 2, 3).contiguous()
    wanted = {6: [0, 1, 2, 6, 8, 9], 5: [0, 2, 6, 8, 9], 4: [0, 2, 8, 9], 2: [0, 8], 0: []}
    for count, ids in wanted.items():
        case["count_B"][:] = count
        expected = [ids + [-1] * (6 - count)] * 2
        assert cases.selected_by(select_pages, case)[0].tolist() == expected


def test_select_refuses_columns_that_wide_reads_would_miss(cases):
    case = cases.select(pages=(10,))
    with pytest.raises(AssertionError):
        odd_BHGP = case["logits_BHGP"][..., :10].contiguous()
        cases.selected_by(select_pages, case | {"logits_BHGP": odd_BHGP})
    with pytest.raises(AssertionError):
        cases.selected_by(select_pages, case | {"num_full_B": case["num_full_B"] + 9})
