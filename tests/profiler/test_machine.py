"""Facts of the machine: control groups of both versions, the CPU's name, the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparsed.profiler.cgroup import read_memory_limit, read_oom_kills
from sparsed.profiler.collectors.nvml import NvmlSession
from sparsed.profiler.machine import read_machine

GIB = 1 << 30


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def version_1(group: str, limit_bytes: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{group}".rstrip("/")
    return {
        "proc/self/cgroup": f"5:cpu:/\n4:memory:/{group}\n0::/",
        f"{folder}/memory.limit_in_bytes": limit_bytes,
        f"{folder}/memory.usage_in_bytes": 3 * GIB,
        f"{folder}/memory.stat": f"cache 1\ntotal_inactive_file {GIB}",
    }


def version_2(group: str, limit: object) -> dict[str, object]:
    folder = f"sys/fs/cgroup/{group}".rstrip("/")
    return {
        "proc/self/cgroup": f"0::/{group}",
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": 3 * GIB,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {GIB}",
    }


@pytest.mark.parametrize("files", [version_1("a/b", 8 * GIB), version_2("a/b", 8 * GIB)])
def test_file_pages_that_can_go_count_as_free(tmp_path: Path, files: dict[str, object]) -> None:
    assert read_memory_limit(write(tmp_path, files)) == (8 * GIB, 6 * GIB)


def test_the_tightest_parent_binds(tmp_path: Path) -> None:
    files = version_2("a", 4 * GIB) | version_2("a/b", 8 * GIB)
    assert read_memory_limit(write(tmp_path, files)) == (4 * GIB, 2 * GIB)


def test_a_path_of_the_host_falls_back_to_the_mount(tmp_path: Path) -> None:
    files = version_2("", 4 * GIB) | {"proc/self/cgroup": "0::/host/only/path"}
    assert read_memory_limit(write(tmp_path, files)) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize("files", [version_1("a", 2**63 - 4096), version_2("a", "max"), {}])
def test_no_limit(tmp_path: Path, files: dict[str, object]) -> None:
    assert read_memory_limit(write(tmp_path, files)) is None


def test_kills_for_want_of_memory_are_those_of_the_own_group(tmp_path: Path) -> None:
    first = version_1("a/b", GIB) | {
        "sys/fs/cgroup/memory/a/b/memory.oom_control": "oom_kill_disable 0\noom_kill 3",
        "sys/fs/cgroup/memory/a/memory.oom_control": "oom_kill_disable 0\noom_kill 9",
    }
    assert read_oom_kills(write(tmp_path / "1", first)) == 3
    second = version_2("a/b", GIB) | {
        "sys/fs/cgroup/a/b/memory.events": "oom 7\noom_kill 2\noom_group_kill 5"
    }
    assert read_oom_kills(write(tmp_path / "2", second)) == 2
    upwards = version_2("a/b", GIB) | {"sys/fs/cgroup/a/memory.events": "oom_kill 4"}
    assert read_oom_kills(write(tmp_path / "3", upwards)) == 4
    assert read_oom_kills(write(tmp_path / "4", version_2("a/b", GIB))) is None


def test_usage_above_the_limit_leaves_nothing_free(tmp_path: Path) -> None:
    limit = read_memory_limit(write(tmp_path, version_2("a", GIB)))
    assert limit is not None and limit.free_bytes == 0


def test_memory_is_cut_to_the_limit(tmp_path: Path) -> None:
    limit_bytes = 5 * 2**20
    files = version_2("a", limit_bytes) | {"proc/cpuinfo": "flags\t: x\nmodel name\t: Fast CPU"}
    facts = read_machine(root=write(tmp_path, files))
    assert facts.cpu_name == "Fast CPU"
    assert (facts.dram_total_bytes, facts.dram_free_bytes) == (limit_bytes, 0)


def test_this_machine() -> None:
    facts = read_machine()
    assert facts.cpu_name
    assert facts.num_cpus == len(os.sched_getaffinity(0))
    assert 0 < facts.dram_free_bytes <= facts.dram_total_bytes <= psutil.virtual_memory().total


def test_the_gpu_is_the_driver_s(make_nvml: Callable[..., Any]) -> None:
    facts = read_machine(nvml=NvmlSession(make_nvml()))
    assert (facts.gpu_name, facts.gpu_uuid, facts.num_gpus) == ("Fake H100", "GPU-1234", 1)
    assert (facts.hbm_total_bytes, facts.hbm_free_bytes) == (80 * GIB, 70 * GIB)
    assert facts.fingerprint == "gpu:Fake H100:80GiB"


def test_an_index_beyond_the_last_gpu_is_no_gpu(make_nvml: Callable[..., Any]) -> None:
    facts = read_machine(gpu_index=3, nvml=NvmlSession(make_nvml()))
    assert facts.gpu_name is None
    assert facts.num_gpus == 1
    assert facts.fingerprint.startswith("cpu:")


def test_reading_the_machine_loads_neither_torch_nor_nvml() -> None:
    code = (
        "import sys, sparsed.profiler.machine, sparsed.profiler.collectors.gauges;"
        "assert not {'torch', 'triton', 'grpc', 'sqlalchemy', 'pynvml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
