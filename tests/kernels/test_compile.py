"""Every kernel, as its wrapper launches it, compiled ahead for three architectures, GPU or not.

The wrapper runs on CPU tensors; its launch is compiled by Triton's own path and never run.
``python tests/kernels/test_compile.py`` writes the table of resources anew.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sparsed.kernels import (
    attend,
    bounds,
    checksum,
    copy,
    gate,
    keep,
    mean_keys,
    merge,
    norm,
    resident,
    resolve,
    rotate,
    sample,
    score,
    seal,
    select,
    selected,
    store,
    summarise,
    tables,
    wasted,
)

SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
SPILL_LIMIT_BYTES = 80  # the widest selection; Triton 3.6 spills six words of float32 attention
TABLE = Path(__file__).with_name("compiled_resources.json")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Resources(NamedTuple):
    """What one kernel takes: registers a thread, local memory (spills) and shared memory."""

    registers: int
    local_bytes: int
    shared_bytes: int


class _Driver:
    """A GPU that compiles and does not run."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # a cache of its own for every architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiled_for(arch: int) -> Iterator[list[Any]]:
    """Launches compile for ``arch`` instead of running; yields the list of what was compiled."""
    compiled: list[Any] = []

    def compile_only(self: JITFunction, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: compiled.append(
            self.run(*args, grid=grid, warmup=True, **kwargs)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", compile_only)
        patch.setattr(triton.runtime.driver, "_active", _Driver(arch))
        yield compiled


def launch_copy(row_bytes: int, *, tile_bytes: int = copy.DEFAULT_TILE_BYTES) -> None:
    rows_M = torch.zeros(5, dtype=torch.int64)
    pages_RX = torch.zeros(5, row_bytes, dtype=torch.int8)
    copy._launch(
        pages_RX,
        pages_RX,
        dst_rows_M=rows_M,
        src_rows_M=rows_M,
        count=rows_M[:1],
        programs=32,
        tile_bytes=tile_bytes,
    )


def launch_checksum(row_bytes: int) -> None:
    rows_M = torch.zeros(5, dtype=torch.int64)
    checksum._launch(torch.zeros(5, row_bytes, dtype=torch.int8), rows_M=rows_M)


def launch_store(dim: int, dtype: torch.dtype) -> None:
    k_BHD = torch.zeros(2, 4, dim, dtype=dtype)
    slots_BH = torch.zeros(2, 4, dtype=torch.int32)
    arena_NTCD = torch.zeros(9, 32, 2, dim, dtype=dtype)
    store._launch(
        arena_NTCD, slots_BH=slots_BH, offsets_B=slots_BH[:, 0].clone(), k_BHD=k_BHD, v_BHD=k_BHD
    )


def launch_bounds(page_size: int, dim: int, dtype: torch.dtype) -> None:
    bounds._launch(torch.zeros(3, page_size, 2, dim, dtype=dtype), minmax=False)


def launch_score(dim: int, dtype: torch.dtype, scale_dtype: torch.dtype | None = None) -> None:
    """With a ``scale_dtype`` the summaries are int8, and ``dtype`` is the query's."""
    int8 = scale_dtype is not None
    score._launch(
        torch.zeros(2, 4, 2 * dim, dtype=dtype),
        torch.zeros(5, 4, 2 * dim, dtype=torch.int8 if int8 else dtype),
        rows_BHF=torch.zeros(2, 4, 3, dtype=torch.int64),
        scales_FX=torch.zeros(5, 4, dtype=scale_dtype) if int8 else None,
    )


def launch_attend(dim: int, dtype: torch.dtype, page_size: int, group: int) -> None:
    slots_BHK = torch.zeros(2, 4, 2 * 256 // page_size, dtype=torch.int32)
    attend._launch(
        torch.zeros(2, 4, group, dim, dtype=dtype),
        torch.zeros(3, page_size, 2, dim, dtype=dtype),
        slots_BHK=slots_BHK,
        tail_tokens_B=slots_BHK[:, 0, 0].clone(),
        scale=1.0,
    )


def launch_resident(dim: int, dtype: torch.dtype, group: int, num_queries: int = 1) -> None:
    zeros_B, num_items_1 = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    items_I3 = torch.zeros(6, 3, dtype=torch.int32)
    resident._launch(
        torch.zeros(2 * num_queries, 4 * group, dim, dtype=dtype),
        torch.zeros(8, 32, 2, dim, dtype=dtype),
        frames_RF=torch.zeros(3, 8, dtype=torch.int32),
        page_slot_MLHP=torch.zeros(9, 2, 4, 4, dtype=torch.int32),
        layer=1,
        plan=resident.ResidentPlan(zeros_B, zeros_B, items_I3, zeros_B, num_items_1),
        scale=1.0,
        programs=4,
    )


def launch_rotate(dim: int, dtype: torch.dtype, *, norm: bool) -> None:
    table_ND = torch.zeros(2, dim, dtype=dtype)
    norm_HD = torch.zeros(5, dim, dtype=dtype) if norm else None
    heads_NHD = torch.zeros(2, 6, dim, dtype=dtype)[:, :5]
    for first_NFD in (None, heads_NHD[:, :1].contiguous()):
        rotate._launch(
            heads_NHD, table_ND, table_ND, norm_HD=norm_HD, eps=1e-6, first_NFD=first_NFD
        )


def launch_merge(dim: int, dtype: torch.dtype) -> None:
    o_BHGD, lse_BHG = torch.zeros(2, 4, 8, dim, dtype=dtype), torch.zeros(2, 4, 8)
    merge._launch(o_BHGD, lse_BHG, o_BHGD, lse_BHG, o_BHGD=o_BHGD.float())


def page_tables() -> tables.PageTables:
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return tables.PageTables(
        ints(5, 40), ints(960), ints(5, 3, 2, 64), ints(5, 3, 2), ints(99), ints(99)
    )


def launch_resolve(columns: int, max_slots: int, page_size: int = 32, first: int = 0) -> None:
    """Counts and rows are views that begin at ``first``, of tensors that others share."""
    pages_BHK = torch.zeros(2, 2, columns, dtype=torch.int32)
    ints_BH, list_M = pages_BHK[:, :, 0].clone(), torch.zeros(pages_BHK.numel(), dtype=torch.int64)
    counts = torch.zeros(8, dtype=torch.int32)
    out = resolve.Resolved(
        slots_BHK=pages_BHK,
        num_hits_BH=ints_BH,
        tail_slots_BH=ints_BH,
        miss_dst_M=list_M,
        miss_src_M=list_M,
        num_misses_1=counts[first : first + 1],
        window_RLH=torch.zeros(5, 3, 2, dtype=torch.int32),
        demand_RLH2=torch.zeros(5, 3, 2, 2, dtype=torch.int32),
        counters_4=torch.zeros(4, dtype=torch.int64),
    )
    rows_B, step_1 = ints_BH[:, 0].clone(), ints_BH[0, :1]
    resolve._launch(pages_BHK, rows_B, rows_B, 1, page_tables(), step_1, page_size, max_slots, out)


def launch_seal(page_size: int) -> None:
    rows_B, list_M = torch.zeros(2, dtype=torch.int32), torch.zeros(12, dtype=torch.int64)
    out = seal.Sealed(list_M, list_M, rows_B[:1])
    seal._launch(rows_B, rows_B, page_tables(), rows_B[:1], page_size, out)


def launch_keep() -> None:
    pages_BHK = torch.zeros(2, 4, 255, dtype=torch.int32)
    kept_RHC, ints_B = torch.zeros(3, 4, 1023, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    keep._launch(pages_BHK, kept_RHC, rows_B=ints_B, count_B=ints_B, keeps_B=ints_B)


def launch_wasted() -> None:
    counts, rows_LM = torch.zeros(9, dtype=torch.int32), torch.zeros(3, 500, dtype=torch.int64)
    wasted._launch(rows_LM, counts[1:4], page_tables(), counts[:1], rows_LM[0, 3:4])


def launch_draw(vocab: int) -> None:
    ints_B, floats_B = torch.zeros(2, dtype=torch.int32), torch.zeros(2)
    key_4B = torch.zeros(4, 2, dtype=torch.int32)
    plan = sample.DrawPlan(key_4B, ints_B, floats_B, floats_B, floats_B, ints_B)
    sample._launch(torch.zeros(2, vocab), plan)


def launch_select(group: int, columns: int) -> None:
    ints_B = torch.zeros(2, dtype=torch.int32)
    select._launch(
        torch.empty(2, 2, group, columns),
        num_full_B=ints_B,
        count_B=ints_B,
        sink_pages=1,
        recent_pages=2,
        out_BHK=torch.zeros(2, 2, 255, dtype=torch.int32),
    )


def launch_selected(dim: int, dtype: torch.dtype, *, page_size: int) -> None:
    q_BHGD = torch.zeros(2, 8, 4, dim, dtype=dtype)
    ints_B, ints_BH = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 8, dtype=torch.int32)
    chosen = selected.Selected(ints_BH.new_zeros(2, 8, 255), ints_BH, ints_B, ints_BH, ints_B)
    partials = selected.make_partials(chosen, q_BHGD, page_size=page_size)
    arena_NTCD = torch.zeros(4, page_size, 2, dim, dtype=dtype)
    selected._launch_hits(q_BHGD, arena_NTCD, chosen, partials, 1.0)
    lse_BHG = torch.zeros(2, 8, 4)
    selected._launch_rest(q_BHGD, arena_NTCD, chosen, partials, 1.0, q_BHGD, lse_BHG)


def launch_mean_keys(
    dim: int,
    dtype: torch.dtype,
    *,
    group: int = 4,
    num_dims: int = 40,
    pages: int = 16,
    max_pages: int = 4144,
) -> None:
    ints_B = torch.zeros(2, dtype=torch.int32)
    mean_keys._launch(
        torch.zeros(2, 4, group, dim, dtype=dtype),
        torch.zeros(8, mean_keys.row_bytes(pages, num_dims), dtype=torch.uint8),
        basis_HDR=torch.zeros(4, dim, num_dims),
        rows_B=ints_B,
        frames_RF=torch.zeros(3, 8, dtype=torch.int32),
        num_full_B=ints_B,
        count_B=ints_B,
        layer=1,
        num_layers=2,
        pages_per_frame=pages,
        scale=1.0,
        sink_pages=1,
        recent_pages=8,
        max_pages=max_pages,
        out_BHK=torch.zeros(2, 4, 255, dtype=torch.int32),
    )


def launch_summarise(dim: int, dtype: torch.dtype, page_size: int, num_dims: int = 40) -> None:
    pages_per_frame = 128 // page_size
    summarise._launch(
        torch.zeros(3, page_size, 2, dim, dtype=dtype),
        torch.zeros(3, dtype=torch.int64),
        basis_NDR=torch.zeros(4, dim, num_dims),
        centre_ND=torch.zeros(4, dim),
        pages_per_frame=pages_per_frame,
        store_SY=torch.zeros(8, mean_keys.row_bytes(pages_per_frame, num_dims), dtype=torch.uint8),
    )


LAUNCHES: dict[str, Callable[[], None]] = {
    "copy 2 KiB": lambda: launch_copy(2048),
    "copy 2560 B": lambda: launch_copy(2560),
    "copy 4 KiB, tile 16 KiB": lambda: launch_copy(4096, tile_bytes=16 << 10),
    "copy 4 KiB": lambda: launch_copy(4096),
    "copy 4 KiB, tile 64 KiB": lambda: launch_copy(4096, tile_bytes=64 << 10),
    "copy 16 KiB": lambda: launch_copy(16384),
    "copy 64 KiB": lambda: launch_copy(65536),
    "checksum 2560 B": lambda: launch_checksum(2560),
    "checksum 16 KiB": lambda: launch_checksum(16384),
    "checksum 64 KiB": lambda: launch_checksum(65536),
    "store 128 bf16": lambda: launch_store(128, BF16),
    "bounds 32x128 bf16": lambda: launch_bounds(32, 128, BF16),
    "bounds 128x80 fp32": lambda: launch_bounds(128, 80, FP32),
    "score 128 bf16": lambda: launch_score(128, BF16),
    "score 256 fp32": lambda: launch_score(256, FP32),
    "score 128 int8": lambda: launch_score(128, BF16, FP16),
    "score 80 int8 fp32": lambda: launch_score(80, FP32, FP32),
    "attend 128 bf16": lambda: launch_attend(128, BF16, 32, 4),
    "attend 80 fp16": lambda: launch_attend(80, FP16, 8, 1),
    "attend 256 bf16": lambda: launch_attend(256, BF16, 128, 24),
    "attend 64 fp32": lambda: launch_attend(64, FP32, 32, 3),
    "attend 256 fp32": lambda: launch_attend(256, FP32, 16, 8),
    "resident 128 bf16": lambda: launch_resident(128, BF16, 4),
    "resident 64 fp32": lambda: launch_resident(64, FP32, 3),
    "resident 256 bf16, 8 queries": lambda: launch_resident(256, BF16, 8, 8),
    "resident 256 fp32, 8 queries": lambda: launch_resident(256, FP32, 24, 8),
    "resident 80 fp16": lambda: launch_resident(80, FP16, 1),
    "rotate 128 bf16": lambda: launch_rotate(128, BF16, norm=False),
    "rotate 128 bf16, norm": lambda: launch_rotate(128, BF16, norm=True),
    "rotate 80 fp32": lambda: launch_rotate(80, FP32, norm=False),
    "norm 4096 bf16": lambda: norm._launch(
        torch.zeros(2, 4096, dtype=BF16), torch.zeros(4096, dtype=BF16), eps=1e-5
    ),
    "gate bf16": lambda: gate._launch(torch.zeros(2, 2 * 14336, dtype=BF16)),
    "merge 128 bf16": lambda: launch_merge(128, BF16),
    "resolve 63 in 512": lambda: launch_resolve(63, 512),
    "resolve 255 in 1,024": lambda: launch_resolve(255, 1024),
    "resolve 255 in 1,024, pages of 8": lambda: launch_resolve(255, 1024, page_size=8),
    "resolve 1,024 in 4,096": lambda: launch_resolve(1024, 4096),
    "selected 128 bf16": lambda: launch_selected(128, BF16, page_size=8),
    "selected 80 fp16": lambda: launch_selected(80, FP16, page_size=16),
    "selected 64 fp32": lambda: launch_selected(64, FP32, page_size=32),
    "mean keys 128 bf16": lambda: launch_mean_keys(128, BF16),
    "mean keys 128 bf16, 16,384 pages": lambda: launch_mean_keys(128, BF16, max_pages=16_384),
    "mean keys 128 bf16, 32 dims": lambda: launch_mean_keys(128, BF16, group=8, num_dims=32),
    "mean keys 128 bf16, 8 pages": lambda: launch_mean_keys(128, BF16, pages=8),
    "mean keys 80 fp16": lambda: launch_mean_keys(80, FP16, group=1),
    "mean keys 64 fp32": lambda: launch_mean_keys(64, FP32, group=3, max_pages=900),
    "summarise 8x128 bf16": lambda: launch_summarise(128, BF16, 8),
    "summarise 128x80 fp16": lambda: launch_summarise(80, FP16, 128),
    "summarise 16x64 fp32, 32 dims": lambda: launch_summarise(64, FP32, 16, 32),
    "seal": lambda: launch_seal(32),
    "wasted": launch_wasted,
    "keep": launch_keep,
    "draw of 64": lambda: launch_draw(64),
    "draw of 49,152": lambda: launch_draw(49_152),
    "draw of 151,936": lambda: launch_draw(151_936),
    "draw of 32,001": lambda: launch_draw(32_001),
    **{
        f"select of {columns:,}, group {group}": partial(launch_select, group, columns)
        for columns in (4144, 16_384, 32_768)
        for group in (3, 4, 6)
    },
}


def resources(kernel: Any, folder: Path) -> Resources:
    """Registers and local memory from the machine code, shared memory from the compiler."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.check_output([cuobjdump, "--dump-resource-usage", str(cubin)], text=True)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Resources(registers, stack + local, kernel.metadata.shared)


def measure(name: str, *, arch: int, folder: Path) -> dict[str, Resources]:
    """Resources of every kernel that the launch ``name`` starts."""
    with compiled_for(arch) as compiled:
        LAUNCHES[name]()
    return {kernel.metadata.name: resources(kernel, folder) for kernel in compiled}


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_every_launch_compiles_and_fits(name: str, arch: int, tmp_path: Path) -> None:
    table = json.loads(TABLE.read_text())
    measured = measure(name, arch=arch, folder=tmp_path)
    assert measured
    for kernel, now in measured.items():
        assert now.shared_bytes <= SHARED_LIMIT_BYTES[arch]
        assert now.local_bytes <= SPILL_LIMIT_BYTES, f"{kernel} spills {now.local_bytes} bytes"
        if table["triton"] == triton.__version__:  # another compiler has other figures
            before = Resources(**table["kernels"][name][str(arch)][kernel])
            assert now.registers <= 1.15 * before.registers + 4
            assert now.local_bytes <= before.local_bytes
            assert now.shared_bytes <= before.shared_bytes


@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("copy")])
def test_copy_moves_16_bytes_an_access(name: str, arch: int) -> None:
    with compiled_for(arch) as compiled:
        LAUNCHES[name]()
    ptx = compiled[0].asm["ptx"]
    narrow = re.findall(r"(?:ld|st)\.global(?!\.(?:L1::\w+\.)?(?:v4\.b32|v2\.b64)).*", ptx)
    assert re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", ptx)
    assert re.search(r"st\.global\S*\.(v4\.b32|v2\.b64)", ptx)
    assert all(".b64" in line for line in narrow), narrow  # row numbers alone are read singly


def test_copies_of_any_rows_share_one_variant() -> None:
    """A CUDA graph that captured one launch must not meet another kernel."""
    pages_RX = torch.zeros(9, 4096, dtype=torch.int8)
    rows_M = torch.zeros(9, dtype=torch.int64)
    with compiled_for(90) as compiled:
        for first, count in ((0, rows_M[:1]), (1, rows_M[1:2]), (0, rows_M[3:4])):
            rows = rows_M[first : first + 1 + 3 * first]
            copy._launch(
                pages_RX,
                pages_RX,
                dst_rows_M=rows,
                src_rows_M=rows,
                count=count,
                programs=32,
                tile_bytes=copy.DEFAULT_TILE_BYTES,
            )
    assert len({kernel.hash for kernel in compiled}) == 1


@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("checksum")])
def test_checksums_read_16_bytes_an_access(name: str, arch: int) -> None:
    with compiled_for(arch) as compiled:
        LAUNCHES[name]()
    loads = re.findall(r"ld\.global.*", compiled[0].asm["ptx"])
    narrow = [load for load in loads if not re.search(r"\.(v4\.b32|v2\.b64)", load)]
    assert len(narrow) < len(loads)
    assert all(".b64" in load for load in narrow), narrow  # row numbers alone are read singly


@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
@pytest.mark.parametrize(("name", "page_bytes"), [("score 128 bf16", 512), ("score 128 int8", 256)])
def test_scores_read_16_bytes_an_access(name: str, page_bytes: int, arch: int) -> None:
    with compiled_for(arch) as compiled:
        LAUNCHES[name]()
    wide = re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", compiled[0].asm["ptx"])
    threads = 32 * compiled[0].metadata.num_warps
    assert 16 * threads * len(wide) == score._TILE_PAGES * page_bytes  # all of the summaries


@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("select of")])
def test_selections_read_16_bytes_an_access(name: str, arch: int) -> None:
    with compiled_for(arch) as compiled:
        LAUNCHES[name]()
    pieces = -(-int(name.split()[2].replace(",", "")) // 1024)
    wide = re.findall(r"ld\.global\S*\.v4\.b32", compiled[-1].asm["ptx"])
    assert len(wide) >= pieces


@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
def test_mean_keys_are_read_and_their_logits_written_16_bytes_an_access(arch: int) -> None:
    with compiled_for(arch) as compiled:
        LAUNCHES["mean keys 128 bf16"]()
    ptx = compiled[1].asm["ptx"]
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 15  # codes, and levels of queries
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == 4  # query heads


@pytest.mark.parametrize("columns", [4096, 65_536])
def test_selections_of_any_batch_share_one_variant(columns: int) -> None:
    with compiled_for(90) as compiled:
        for num_requests, skip in ((1, 0), (16, 1), (3, 3)):
            ints_B = torch.zeros(99, dtype=torch.int32)[skip : skip + num_requests]
            out_X = torch.zeros(9999, dtype=torch.int32)[skip:]
            select._launch(
                torch.empty(num_requests, 2, 4, columns),
                num_full_B=ints_B,
                count_B=ints_B,
                sink_pages=skip,
                recent_pages=num_requests,
                out_BHK=out_X[: num_requests * 2 * (1 + skip)].view(num_requests, 2, -1),
            )
    assert len({kernel.hash for kernel in compiled}) == 2


@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("resolve")])
def test_slots_are_read_as_they_are_written(name: str) -> None:
    """Steps, victims and old pages pass between threads through memory."""
    with compiled_for(90) as compiled:
        LAUNCHES[name]()
    code = compiled[0].asm
    kinds = {"tt.load": "r", "tt.store": "w", "gpu.barrier": "|", "ttg.barrier": "|"}
    found = re.findall(r"(tt\.load|tt\.store|gpu\.barrier|ttg\.barrier) ", code["ttgir"] + " ")
    order = "".join(kinds[kind] for kind in found)
    # Last uses read | used slots marked | classes read, victims written | they and their pages
    # read | replaced.
    assert re.fullmatch(r"r+\|ww\|[rw]*r+w\|r+\|[rw]+", order), order
    assert "ld.global.nc" not in code["ptx"]


def test_slots_of_any_views_share_one_variant() -> None:
    """A CUDA graph that captured one layer must not meet another kernel in the next."""
    counts = torch.zeros(8, dtype=torch.int32)
    with compiled_for(90) as compiled:
        for first in (0, 1, 4):
            rows_B, step_1 = counts[first : first + 2], counts[first : first + 1]
            list_M = torch.zeros(24, dtype=torch.int64)[first:]
            sealed = seal.Sealed(list_M, list_M, step_1)
            seal._launch(rows_B, rows_B, page_tables(), step_1, 32, sealed)
            launch_resolve(63, 512, first=first)
    assert len({kernel.hash for kernel in compiled}) == 2


def write_table(folder: Path) -> None:
    """Measure every launch and write the table; read the difference before you commit it."""
    kernels = {
        name: {
            str(arch): {
                kernel: used._asdict()
                for kernel, used in measure(name, arch=arch, folder=folder).items()
            }
            for arch in SHARED_LIMIT_BYTES
        }
        for name in LAUNCHES
    }
    table = {"triton": triton.__version__, "kernels": kernels}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder))
