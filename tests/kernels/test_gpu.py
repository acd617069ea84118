"""The kernels on a real device, against loops in float64; speeds are printed (run with -s)."""

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparsed.kernels import reference_select
from sparsed.kernels.attend import attend_pages
from sparsed.kernels.bounds import page_bounds
from sparsed.kernels.checksum import page_checksums
from sparsed.kernels.copy import copy_pages
from sparsed.kernels.gate import silu_mul
from sparsed.kernels.keep import keep_pages
from sparsed.kernels.merge import merge_states
from sparsed.kernels.norm import rms_norm
from sparsed.kernels.resident import BLOCK_TOKENS, attend_resident
from sparsed.kernels.rotate import rotate_heads
from sparsed.kernels.sample import DrawPlan, draw_tokens
from sparsed.kernels.score import score_pages
from sparsed.kernels.select import select_pages
from sparsed.kernels.store import store_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def seed() -> int:
    """Another one every run; pytest shows it where a test fails."""
    seed = int.from_bytes(os.urandom(2), "little")
    print(f"seed {seed}")
    return seed


def to_gpu(case: dict[str, object]) -> dict[str, object]:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in case.items()}


def strided_on_gpu(x: Tensor) -> Tensor:
    """With the strides of ``x``; ``cuda`` closes the gaps between rows."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def resident_on_gpu(case: dict[str, object]) -> dict[str, object]:
    plan = case["plan"]._make(part.cuda() for part in case["plan"])
    return to_gpu(case) | {"q_NHD": strided_on_gpu(case["q_NHD"]), "plan": plan}


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert_close(got.cpu().double(), expected, atol=tolerance, rtol=tolerance)


def median_s(work: Callable[[], object], *, repeats: int = 10) -> float:
    """Median seconds of ``work`` on the current stream, after three warm-up runs."""
    torch.use_deterministic_algorithms(False)  # poisoning memory takes time
    times_s = []
    for repeat in range(repeats + 3):
        torch.cuda._sleep(2_000_000)  # about a millisecond: the launches are queued by then
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times_s.append(begin.elapsed_time(end) / 1e3)
    return sorted(times_s)[repeats // 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [8, 32, 128])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_attend(cases, dim, page_size, dtype, seed):
    case = cases.attend(
        dim=dim, page_size=page_size, dtype=dtype, columns=2 + 600 // page_size, seed=seed
    )
    expected = cases.naive_attend(**case)
    for got, want in zip(attend_pages(**to_gpu(case)), expected, strict=True):
        close(got, want, cases.tolerance[dtype])


@pytest.mark.parametrize("group", [1, 2, 7, 16, 17, 32])
@pytest.mark.parametrize("columns", [1, 8, 9, 150])
def test_attend_of_any_group_and_length(cases, columns, group, seed):
    case = cases.attend(group=group, columns=columns, page_size=32, seed=seed)
    expected = cases.naive_attend(**case)
    for got, want in zip(attend_pages(**to_gpu(case)), expected, strict=True):
        close(got, want, cases.tolerance[torch.float32])


@pytest.mark.parametrize("columns", [1, 40])
def test_attend_to_nothing(cases, columns):
    o_BHGD, lse_BHG = attend_pages(**to_gpu(cases.attend(columns=columns, absent_frac=1.0)))
    assert (o_BHGD == 0).all() and (lse_BHG == -math.inf).all()


def test_attend_does_not_depend_on_the_batch(cases, seed):
    case = to_gpu(cases.attend(requests=5, columns=70, seed=seed))
    o_BHGD, lse_BHG = attend_pages(**case)
    for name in ("q_BHGD", "slots_BHK", "tail_tokens_B"):
        case[name] = case[name][3:4].contiguous()
    o_alone, lse_alone = attend_pages(**case)
    assert torch.equal(o_alone, o_BHGD[3:4]) and torch.equal(lse_alone, lse_BHG[3:4])


def test_attend_in_a_captured_graph_reads_new_slots(cases, seed):
    case = to_gpu(cases.attend(columns=40, absent_frac=0.0, seed=seed))
    attend_pages(**case)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o_BHGD, _ = attend_pages(**case)
    case["slots_BHK"][:, :, :20] = -1
    graph.replay()
    expected_BHGD, _ = cases.naive_attend(**case)
    close(o_BHGD, expected_BHGD, cases.tolerance[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [8, 32, 128])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_resident(cases, dim, page_size, dtype, seed):
    lengths = (300, 128, 0, 2, 1000, 129)
    case = cases.resident(
        lengths=lengths, dim=dim, page_size=page_size, dtype=dtype, queries=2, seed=seed
    )
    got = attend_resident(**resident_on_gpu(case))
    assert got.dtype == dtype
    close(got, cases.naive_resident(**case), cases.tolerance[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "queries"),
    [(1, 1), (1, 8), (2, 5), (4, 1), (5, 4), (7, 3), (8, 8), (16, 1), (17, 1), (24, 1), (24, 8)],
)
@pytest.mark.parametrize("dim", [64, 128])
def test_resident_of_any_group_and_queries(cases, dim, group, queries, dtype, seed):
    case = cases.resident(
        lengths=(queries, 0, 700), queries=queries, group=group, dim=dim, dtype=dtype, seed=seed
    )
    got = attend_resident(**resident_on_gpu(case))
    close(got, cases.naive_resident(**case), cases.tolerance[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_resident_of_the_most_lines_and_dims(cases, dtype, seed):
    case = cases.resident(lengths=(8, 0, 700), queries=8, group=24, dim=256, dtype=dtype, seed=seed)
    got = attend_resident(**resident_on_gpu(case))
    close(got, cases.naive_resident(**case), cases.tolerance[dtype])


@pytest.mark.parametrize("programs", [1, 5, 999])
@pytest.mark.parametrize("split_tokens", [128, 256, 2048])
def test_resident_of_any_split_and_programs(cases, split_tokens, programs, seed):
    case = cases.resident(
        lengths=(1, 2300, 127, 128), split_tokens=split_tokens, programs=programs, seed=seed
    )
    got = attend_resident(**resident_on_gpu(case))
    close(got, cases.naive_resident(**case), cases.tolerance[torch.float32])


def test_resident_of_padding_alone(cases):
    assert (attend_resident(**resident_on_gpu(cases.resident(lengths=(0, 0)))) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [0, 3, 4])
def test_resident_does_not_depend_on_the_batch(cases, chosen, dtype, seed):
    lengths = (300, 1, 129, 2300, 640)
    case = resident_on_gpu(cases.resident(lengths=lengths, dim=128, dtype=dtype, seed=seed))
    o_NHD = attend_resident(**case)
    row = int(case["plan"].rows_B[chosen])
    case["plan"] = cases.resident_plan([row], [lengths[chosen]], max_items=11)
    case["q_NHD"] = case["q_NHD"][chosen : chosen + 1]
    o_alone = attend_resident(**resident_on_gpu(case | {"programs": 7}))
    assert torch.equal(o_alone, o_NHD[chosen : chosen + 1])


def test_resident_in_a_captured_graph_reads_new_plans(cases, seed):
    case = resident_on_gpu(cases.resident(lengths=(640, 129, 300), seed=seed))
    rows = case["plan"].rows_B.tolist()
    case["plan"] = case["plan"]._make(torch.zeros_like(part) for part in case["plan"])
    attend_resident(**case)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o_NHD = attend_resident(**case)
    for order, lengths in [((0, 1, 2), (640, 129, 300)), ((2, 0, 1), (257, 513, 0))]:
        plan = cases.resident_plan([rows[i] for i in order], lengths)
        for buffer, part in zip(case["plan"], plan, strict=True):
            buffer.copy_(part)
        graph.replay()
        close(o_NHD, cases.naive_resident(**case), cases.tolerance[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_rotate(cases, dim, norm, dtype, seed):
    case = cases.rotate(tokens=9, heads=7, dim=dim, norm=norm, dtype=dtype, seed=seed)
    expected_NHD = cases.naive_rotate(**case)
    values_NHD = cases.random(9, 2, dim, dtype=dtype, seed=seed + 3).cuda()
    rows_NHD = torch.cat((case["heads_NHD"].cuda(), values_NHD), dim=1)
    heads_NHD = rows_NHD[:, :7]
    got_NHD = rotate_heads(**to_gpu(case) | {"heads_NHD": heads_NHD})
    assert got_NHD is heads_NHD and torch.equal(rows_NHD[:, 7:], values_NHD)
    close(got_NHD, expected_NHD, cases.tolerance[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 1023), (33, 14336)])
def test_silu_mul(cases, rows, width, dtype, seed):
    gate_up_NF = 4 * cases.random(rows, 2 * width, dtype=dtype, seed=seed)
    got_NF = silu_mul(gate_up_NF.cuda())
    assert got_NF.dtype == dtype
    close(got_NF, cases.naive_silu_mul(gate_up_NF), cases.tolerance[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (300, 576), (7, 5120)])
def test_rms_norm(cases, rows, width, dtype, seed):
    x_ND = 3 * cases.random(rows, width, dtype=dtype, seed=seed)
    weight_D = cases.random(width, dtype=dtype, seed=seed + 1)
    x = x_ND.double()
    expected = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight_D.double()
    close(rms_norm(x_ND.cuda(), weight_D.cuda(), eps=1e-5), expected, cases.tolerance[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 8, 9, 24])
def test_merge(cases, group, dim, dtype, seed):
    states = cases.merge(group=group, dim=dim, dtype=dtype, seed=seed)
    expected = cases.naive_merge(*states)
    for got, want in zip(merge_states(*map(strided_on_gpu, states)), expected, strict=True):
        assert got.dtype == torch.float32
        close(got, want, 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "frame_pages"), [(64, 4), (80, 16), (128, 1)])
def test_score(cases, dim, frame_pages, dtype, seed):
    query_BHE = cases.split_query(cases.random(3, 4, dim, dtype=dtype, seed=seed))
    corners_F2XD = cases.random(99, 2, frame_pages, dim, dtype=dtype, seed=seed + 1)
    summaries_FXE = torch.cat((corners_F2XD.amax(1), corners_F2XD.amin(1)), dim=-1)
    rows_BHF = cases.random_slots(99, 3, 4, 7, absent_frac=0.2, seed=seed).long()
    expected = cases.naive_score(query_BHE, summaries_FXE, rows_BHF=rows_BHF)
    got = score_pages(query_BHE.cuda(), summaries_FXE.cuda(), rows_BHF=rows_BHF.cuda())
    close(got, expected, 1e-4)  # float32 inside, whatever the dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("dim", "frame_pages"), [(64, 4), (80, 16), (128, 1), (128, 8)])
def test_score_of_8_bits(cases, dim, frame_pages, scale_dtype, dtype, seed):
    query_BHE = cases.split_query(cases.random(3, 4, dim, dtype=dtype, seed=seed))
    bounds_FXE, scales_FX = cases.int8_bounds(99, frame_pages, dim, dtype=scale_dtype, seed=seed)
    rows_BHF = cases.random_slots(99, 3, 4, 7, absent_frac=0.2, seed=seed).long()
    real_FXE = bounds_FXE.double() * scales_FX.double()[..., None]
    expected = cases.naive_score(query_BHE, real_FXE, rows_BHF=rows_BHF)
    got = score_pages(
        query_BHE.cuda(), bounds_FXE.cuda(), rows_BHF=rows_BHF.cuda(), scales_FX=scales_FX.cuda()
    )
    close(got, expected, 2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("minmax", [True, False])
@pytest.mark.parametrize(("page_size", "dim"), [(8, 64), (32, 80), (128, 256)])
def test_bounds(cases, page_size, dim, minmax, dtype, seed):
    pages_MTCD = cases.random(13, page_size, 2, dim, dtype=dtype, seed=seed)
    expected = cases.naive_bounds(pages_MTCD, minmax=minmax)
    close(page_bounds(pages_MTCD.cuda(), minmax=minmax), expected, cases.tolerance[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_store(cases, dim, dtype, seed):
    arena_NTCD = cases.random(50, 32, 2, dim, dtype=dtype, seed=seed)
    kv_BHCD = cases.random(6, 4, 2, dim, dtype=dtype, seed=seed + 1)
    tokens = {
        "slots_BH": cases.random_slots(50, 6, 4, absent_frac=0.2, seed=seed),
        "offsets_B": torch.tensor([0, 31, 7, 7, 16, 1], dtype=torch.int32),
        "k_BHD": kv_BHCD[:, :, 0],
        "v_BHD": kv_BHCD[:, :, 1],
    }
    expected_NTCD = cases.naive_store(arena_NTCD, **tokens)
    stored_NTCD = arena_NTCD.cuda()
    store_tokens(stored_NTCD, **to_gpu(tokens))
    assert torch.equal(stored_NTCD.cpu(), expected_NTCD)


def plan_on_gpu(plan: DrawPlan) -> DrawPlan:
    return plan._make(part.cuda() for part in plan)


def test_the_numbers_of_draws_are_those_of_numpy(cases, seed):
    _, plan = cases.draw(rows=5000, vocab=1, seed=seed)
    got_B = cases.uniforms(plan.key_4B.cuda(), plan.index_B.cuda())
    assert got_B.tolist() == cases.numpy_uniforms(plan)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("vocab", [1, 7, 4096, 32_001, 49_152, 151_936])
def test_draw(cases, vocab, spread, ties, seed):
    logits_BV, plan = cases.draw(rows=150, vocab=vocab, spread=spread, ties=ties, seed=seed)
    tokens_B = draw_tokens(logits_BV.cuda(), plan=plan_on_gpu(plan)).cpu()
    fair = cases.fair_draws(tokens_B, logits_BV, plan, slack=2e-5)
    unfair = [row for row, ok in enumerate(fair) if not ok]
    assert not unfair, [[part[..., row].tolist() for part in plan] for row in unfair]
    if vocab < 10_000:  # beyond, a float32 too often lies on the other side of a boundary
        assert (tokens_B != draw_tokens(logits_BV, plan=plan)).sum() <= 3


def test_draw_does_not_depend_on_the_batch(cases, seed):
    logits_BV, plan = cases.draw(rows=64, vocab=49_152, seed=seed)
    logits_BV, plan = logits_BV.cuda(), plan_on_gpu(plan)
    together_B = draw_tokens(logits_BV, plan=plan)
    for b in range(64):
        one = plan._make(part[..., b : b + 1].contiguous() for part in plan)
        assert torch.equal(draw_tokens(logits_BV[b : b + 1], plan=one), together_B[b : b + 1])


def test_draw_in_a_captured_graph_reads_new_plans(cases, seed):
    logits_BV, plan = cases.draw(rows=16, vocab=32_000, seed=seed)
    static_BV, static = logits_BV.cuda(), plan_on_gpu(plan)
    draw_tokens(static_BV, plan=static)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_B = draw_tokens(static_BV, plan=static)
    for later in range(1, 4):
        logits_BV, plan = cases.draw(rows=16, vocab=32_000, seed=seed + later)
        static_BV.copy_(logits_BV)
        for buffer, part in zip(static, plan, strict=True):
            buffer.copy_(part)
        graph.replay()
        assert all(cases.fair_draws(tokens_B.cpu(), logits_BV, plan, slack=2e-5))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draws_of_no_number_end(cases, temperature):
    logits_BV = torch.full((4, 50_000), math.nan)
    logits_BV[1], logits_BV[2, 40_000], logits_BV[3, 5] = -math.inf, -9.0, math.inf
    plan = cases.draw_plan(
        key=[1] * 4, temperature=[temperature] * 4, top_p=[0.5] * 4, min_p=[0.1] * 4, top_k=[3] * 4
    )
    tokens = draw_tokens(logits_BV.cuda(), plan=plan_on_gpu(plan)).tolist()
    assert tokens[:3] == [0, 0, 40_000] and 0 <= tokens[3] < 50_000


def test_frequencies_of_draws_are_the_probabilities(cases):
    logits_V = torch.tensor([-1.0, 2.0, 1.0, -1.5, 0.0, 0.0])
    plan = cases.draw_plan(key=[7] * 20_000, index=range(20_000), top_k=[3] * 20_000)
    tokens_B = draw_tokens(logits_V.repeat(20_000, 1).cuda(), plan=plan_on_gpu(plan))
    counts = torch.bincount(tokens_B.cpu(), minlength=6)
    expected = torch.softmax(logits_V[[1, 2, 4]], dim=0) * 20_000
    assert counts[[0, 3, 5]].sum() == 0
    assert float(((counts[[1, 2, 4]] - expected) ** 2 / expected).sum()) < 14  # 0.1 %


@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("group", [1, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("longest", [100, 128, 1000, 4096, 8192, 8193, 70_000])
def test_select(cases, longest, group, spread, seed):
    pages = (longest, 0, longest // 2, 5, longest - 1)
    shape = {"pages": pages, "group": group, "spread": spread, "columns": 255, "seed": seed}
    repeated = cases.select(**shape, ties=True)
    got_BHK = cases.selected_by(select_pages, to_gpu(repeated)).cpu()
    assert torch.equal(got_BHK, cases.naive_select(**repeated))
    case = cases.select(**shape)
    got_BHK = cases.selected_by(select_pages, to_gpu(case)).cpu()
    assert all(cases.fair_selections(got_BHK, case, slack=1e-4))


@pytest.mark.parametrize("longest", [4096, 20_000])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_select_without_broken_heads(cases, broken, longest, seed):
    case = cases.select(pages=(longest, 7), ties=True, columns=30, seed=seed)
    case["count_B"][:] = 30
    head_X = case["logits_BHGP"][0, 0, 1, :longest]
    head_X[slice(None) if broken == -math.inf else slice(70, 71)] = broken
    expected_BHK = cases.selected_by(select_pages, case)
    assert torch.equal(cases.selected_by(select_pages, to_gpu(case)).cpu(), expected_BHK)


@pytest.mark.parametrize("longest", [2000, 9000])
def test_select_does_not_depend_on_the_batch(cases, longest, seed):
    case = to_gpu(cases.select(pages=(longest, 700, 9, 1500), columns=99, seed=seed))
    together_BHK = cases.selected_by(select_pages, case)
    for b in range(4):
        parts = {name: case[name][b : b + 1] for name in ("logits_BHGP", "num_full_B", "count_B")}
        one = case | parts | {"out_BHK": case["out_BHK"][b : b + 1]}
        assert torch.equal(cases.selected_by(select_pages, one), together_BHK[b : b + 1])


@pytest.mark.parametrize("longest", [2000, 9000])
def test_select_in_a_captured_graph_reads_new_requests(cases, longest, seed):
    static = to_gpu(cases.select(pages=(longest,) * 3, columns=99, seed=seed))
    select_pages(**static)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_pages(**static)
    for later in range(1, 4):
        pages = (longest - later, 300 * later, later)
        case = cases.select(pages=pages, columns=99, ties=True, seed=seed + later)
        forced = {name: static[name] for name in ("sink_pages", "recent_pages")}
        static["logits_BHGP"].fill_(math.nan)
        columns = min(static["logits_BHGP"].shape[3], case["logits_BHGP"].shape[3])
        static["logits_BHGP"][..., :columns].copy_(case["logits_BHGP"][..., :columns])
        for name in ("num_full_B", "count_B"):
            static[name].copy_(case[name])
        graph.replay()
        got_BHK = cases.rising(static["out_BHK"].cpu())
        assert torch.equal(got_BHK, cases.naive_select(**case | forced))


@pytest.mark.parametrize("width", [1, 31, 700, 9000])
def test_kept_lists(width, seed):
    """Against the twin, some requests of each kind, in two rounds."""
    numbers = torch.Generator().manual_seed(seed)
    kept_RHC = torch.full((40, 3, 9000), -1, dtype=torch.int32)
    on_gpu_RHC = kept_RHC.cuda()
    for keeps in (0, 1):
        pages_BHK = torch.randint(0, 10**6, (24, 3, width), generator=numbers, dtype=torch.int32)
        rows_B = torch.randperm(40, generator=numbers)[:24].int()
        count_B = torch.randint(0, width + 1, (24,), generator=numbers, dtype=torch.int32)
        keeps_B = keeps * torch.randint(0, 2, (24,), generator=numbers, dtype=torch.int32)
        given = {"rows_B": rows_B, "count_B": count_B, "keeps_B": keeps_B}
        got_BHK = pages_BHK.cuda()
        keep_pages(got_BHK, on_gpu_RHC, **to_gpu(given))
        reference_select.keep_pages(pages_BHK, kept_RHC, **given)
        assert torch.equal(got_BHK.cpu(), pages_BHK) and torch.equal(on_gpu_RHC.cpu(), kept_RHC)


@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
@pytest.mark.parametrize("row_words", [12, 640, 4096, 5000])
def test_copy(cases, direction, row_words, seed):
    dst_RX, src_RX = (cases.random(200, row_words, seed=seed + i).pin_memory() for i in (0, 1))
    plan = {
        "dst_rows_M": cases.random_slots(200, 150, absent_frac=0.0, seed=seed).long(),
        "src_rows_M": cases.random_slots(200, 150, absent_frac=0.3, seed=seed + 1).long(),
    }
    expected_RX = cases.naive_copy(dst_RX, src_RX, **plan)
    dst_RX = dst_RX.cuda() if direction.endswith("d") else dst_RX
    src_RX = src_RX.cuda() if direction.startswith("d") else src_RX
    copy_pages(dst_RX, src_RX, **to_gpu(plan))
    torch.cuda.synchronize()
    assert torch.equal(dst_RX.cpu(), expected_RX)


@pytest.mark.parametrize("tile_kib", [8, 16, 32, 64])
@pytest.mark.parametrize("row_words", [12, 640, 1024, 5000])
def test_copy_takes_its_count_from_the_device(cases, row_words, tile_kib, seed):
    src_RX = cases.random(200, row_words, seed=seed).pin_memory()
    dst_RX, before_RX = (cases.random(200, row_words, seed=seed + 1).cuda() for _ in range(2))
    rows = {"dst_rows_M": torch.randperm(200).cuda(), "src_rows_M": torch.randperm(200).cuda()}
    for count in (0, 1, 77, 500):
        expected_RX = before_RX.clone()
        wanted = [index[:count] for index in rows.values()]
        expected_RX[wanted[0]] = src_RX.cuda()[wanted[1]]
        dst_RX.copy_(before_RX)
        told = torch.tensor(count, dtype=torch.int32, device="cuda")
        copy_pages(dst_RX, src_RX, **rows, count=told, programs=8, tile_bytes=tile_kib << 10)
        assert torch.equal(dst_RX, expected_RX)


def test_copy_reads_memory_registered_by_its_owner(cases, seed):
    src_RX, rows_M = cases.random(64, 1024, seed=seed), torch.arange(64, device="cuda")
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(src_RX.data_ptr(), src_RX.nbytes, 0)) == 0
    try:
        dst_RX = torch.empty(64, 1024, device="cuda")
        copy_pages(dst_RX, src_RX, dst_rows_M=rows_M, src_rows_M=rows_M.flip(0))
        assert torch.equal(dst_RX.cpu(), src_RX.flip(0))
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(src_RX.data_ptr())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 640, 5000, 32768])
def test_checksums_are_the_same_on_both_tiers(cases, width, dtype, seed):
    host_RX = cases.random(90, width, dtype=dtype, seed=seed).pin_memory()
    rows_M = cases.random_slots(90, 80, absent_frac=0.2, seed=seed).long()
    expected_M = page_checksums(host_RX, rows_M=rows_M)
    for store_RX in (host_RX, host_RX.cuda()):
        assert torch.equal(page_checksums(store_RX, rows_M=rows_M.cuda()).cpu(), expected_M)


def test_copy_refuses_memory_it_cannot_reach(cases):
    rows_M = torch.arange(4, device="cuda")
    with pytest.raises(AssertionError):
        copy_pages(
            torch.empty(4, 64, device="cuda"),
            cases.random(4, 64),
            dst_rows_M=rows_M,
            src_rows_M=rows_M,
        )


@pytest.mark.slow
@pytest.mark.parametrize("page_kib", [4, 16, 64])
def test_copy_speed(page_kib):
    num_rows, moved = (1 << 20) // page_kib, (1 << 18) // page_kib  # 1 GiB, 256 MiB of it
    host_RX = torch.zeros(num_rows, page_kib << 10, dtype=torch.uint8, pin_memory=True)
    hot_RX = torch.zeros(moved, page_kib << 10, dtype=torch.uint8, device="cuda")
    host_rows_M = torch.randperm(num_rows, device="cuda")[:moved].contiguous()
    hot_rows_M = torch.arange(moved, device="cuda")
    for programs in (8, 16, 32):
        h2d_s = median_s(
            lambda programs=programs: copy_pages(
                hot_RX, host_RX, dst_rows_M=hot_rows_M, src_rows_M=host_rows_M, programs=programs
            )
        )
        d2h_s = median_s(
            lambda programs=programs: copy_pages(
                host_RX, hot_RX, dst_rows_M=host_rows_M, src_rows_M=hot_rows_M, programs=programs
            )
        )
        h2d_gb_per_s, d2h_gb_per_s = (hot_RX.nbytes / s / 1e9 for s in (h2d_s, d2h_s))
        print(
            f"copy of {page_kib} KiB pages, {programs} programs: "
            f"h2d {h2d_gb_per_s:.1f} GB/s, d2h {d2h_gb_per_s:.1f} GB/s"
        )
        assert h2d_gb_per_s > 1 and d2h_gb_per_s > 1  # a narrow load would be far below


@pytest.mark.slow
@pytest.mark.parametrize(("requests", "tokens"), [(1, 2048), (24, 2048), (1, 32768)])
def test_attend_speed(requests, tokens):
    heads, group, dim, page_size = 8, 4, 128, 32
    slots = torch.randperm(requests * heads * tokens // page_size, device="cuda").int()
    case = {
        "q_BHGD": torch.randn(requests, heads, group, dim, device="cuda", dtype=torch.bfloat16),
        "arena_NTCD": torch.zeros(
            len(slots), page_size, 2, dim, device="cuda", dtype=torch.bfloat16
        ),
        "slots_BHK": slots.view(requests, heads, -1),
        "tail_tokens_B": torch.full((requests,), page_size, dtype=torch.int32, device="cuda"),
        "scale": dim**-0.5,
    }
    attend_s = median_s(lambda: attend_pages(**case))
    gb_per_s = case["arena_NTCD"].nbytes / attend_s / 1e9
    print(f"attend {requests} x {tokens} tokens: {attend_s * 1e6:.0f} us, {gb_per_s:.0f} GB/s")
    assert gb_per_s > 1


@pytest.mark.slow
@pytest.mark.parametrize(("requests", "tokens"), [(32, 8192), (1, 32768)])
def test_resident_speed(cases, requests, tokens):
    heads, group, dim, page_size = 8, 4, 128, 32
    frames = torch.randperm(requests * tokens // BLOCK_TOKENS, device="cuda").int()
    blocks = torch.randperm(len(frames) * heads, device="cuda")
    pages = torch.arange(BLOCK_TOKENS // page_size, device="cuda")
    slots = (blocks[:, None] * len(pages) + pages).int()
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    plan = cases.resident_plan(
        range(requests), [tokens] * requests, split_tokens=tokens // 32, max_items=requests * 32
    )
    case = {
        "q_NHD": torch.randn(requests, heads * group, dim, device="cuda", dtype=torch.bfloat16),
        "arena_NTCD": torch.zeros(
            slots.numel(), page_size, 2, dim, device="cuda", dtype=torch.bfloat16
        ),
        "frames_RF": frames.view(requests, -1),
        "page_slot_MLHP": slots.view(len(frames), 1, heads, -1),
        "layer": 0,
        "plan": plan._make(part.cuda() for part in plan),
        "scale": dim**-0.5,
        "programs": 2 * processors // heads,
    }
    attend_s = median_s(lambda: attend_resident(**case))
    gb_per_s = case["arena_NTCD"].nbytes / attend_s / 1e9
    print(f"resident {requests} x {tokens} tokens: {attend_s * 1e6:.0f} us, {gb_per_s:.0f} GB/s")
    assert gb_per_s > 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 32, 256])
@pytest.mark.parametrize("vocab", [49_152, 128_256, 151_936])
def test_draw_speed(cases, rows, vocab):
    logits_BV = (torch.randn(rows, vocab) * 3).cuda()
    cuts = {
        "greedy": {"temperature": [0.0]},
        "temperature": {},
        "min-p": {"min_p": [0.05]},
        "top-k": {"top_k": [50]},
        "top-p": {"top_p": [0.9]},
        "top-k and top-p": {"top_k": [20], "top_p": [0.8], "temperature": [0.7]},
    }
    for name, cut in cuts.items():
        columns = {column: values * rows for column, values in cut.items()}
        plan = plan_on_gpu(cases.draw_plan(key=range(rows), **columns))
        draw_s = median_s(lambda plan=plan: draw_tokens(logits_BV, plan=plan))
        print(f"draw of {vocab}, {rows} rows, {name}: {draw_s * 1e6:.0f} us")
        assert draw_s < 1e-2
    argmax_s = median_s(lambda: logits_BV.argmax(dim=-1))
    print(f"argmax of {vocab}, {rows} rows: {argmax_s * 1e6:.0f} us")


@pytest.mark.slow
@pytest.mark.parametrize(("requests", "pages"), [(1, 4096), (24, 4096), (24, 8192), (4, 65_536)])
def test_select_speed(cases, requests, pages):
    group, columns = 4, 255
    case = to_gpu(cases.select(pages=(pages,) * requests, heads=8, group=group, columns=columns))
    case["count_B"].fill_(columns)
    select_s = median_s(lambda: select_pages(**case))
    print(f"select of {pages}, {requests} requests x 8 heads: {select_s * 1e6:.1f} us")
    assert select_s < 1e-2
