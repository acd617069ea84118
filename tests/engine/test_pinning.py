"""Pinning with a registrar that only takes notes: the memory is real, the GPU is not."""

from __future__ import annotations

import mmap
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsed.core import ExitCode, StartError
from sparsed.engine.cuda_driver import CudaError
from sparsed.engine.kvcache import pinning
from sparsed.engine.kvcache.pinning import check_memory, cpus_near, frame_chunks, pin, touch

MIB = 1 << 20


class FakeRegistrar:
    """Refuses once it holds ``most_bytes``."""

    def __init__(self, most_bytes: int = 1 << 60) -> None:
        self.most_bytes = most_bytes
        self.held: dict[int, int] = {}

    def register(self, address: int, num_bytes: int) -> None:
        if sum(self.held.values()) + num_bytes > self.most_bytes:
            raise CudaError("cuMemHostRegister", code=2, name="CUDA_ERROR_OUT_OF_MEMORY")
        self.held[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.held[address]


class Memory:
    """A memory file with some contents, mapped."""

    def __init__(self, num_bytes: int) -> None:
        self.fd = os.memfd_create("test")
        os.ftruncate(self.fd, num_bytes)
        self.map = mmap.mmap(self.fd, num_bytes)
        self.bytes = np.frombuffer(self.map, dtype=np.uint8)

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    @property
    def allocated_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def __del__(self) -> None:
        os.close(self.fd)


def pin_all(memory: Memory, registrar: FakeRegistrar, *, max_bytes: int) -> list[float]:
    progress: list[float] = []
    pin(
        memory.address,
        frame_chunks(len(memory.bytes), frame_bytes=MIB, max_bytes=max_bytes),
        registrar=registrar,
        cpus=frozenset(os.sched_getaffinity(0)),
        registered=[],
        on_progress=progress.append,
    )
    return progress


@given(num_frames=st.integers(1, 40), frame_bytes=st.integers(1, 9), max_bytes=st.integers(1, 99))
def test_chunks_cover_all_and_end_on_frames(
    num_frames: int, frame_bytes: int, max_bytes: int
) -> None:
    total = num_frames * frame_bytes
    chunks = frame_chunks(total, frame_bytes=frame_bytes, max_bytes=max_bytes)
    assert [offset for offset, _ in chunks] == np.cumsum([0, *(s for _, s in chunks)])[:-1].tolist()
    assert sum(size for _, size in chunks) == total
    assert all(size % frame_bytes == 0 for _, size in chunks)
    assert all(size <= max(max_bytes, frame_bytes) for _, size in chunks)


def test_every_chunk_is_touched_registered_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "SLICE_BYTES", MIB + 4096)
    memory, registrar = Memory(7 * MIB), FakeRegistrar()
    memory.bytes[5 * MIB + 3] = 77
    assert memory.allocated_bytes < MIB
    progress = pin_all(memory, registrar, max_bytes=3 * MIB)
    assert memory.allocated_bytes == 7 * MIB
    assert memory.bytes[5 * MIB + 3] == 77 and memory.bytes.sum() == 77, "contents stay"
    assert list(registrar.held.values()) == [3 * MIB, 3 * MIB, MIB]
    assert min(registrar.held) == memory.address
    assert progress == pytest.approx([3 / 7, 6 / 7, 1.0])


def test_an_older_kernel_is_touched_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_MADV_POPULATE_WRITE", 9999)
    memory = Memory(MIB)
    memory.bytes[4096] = 5
    touch(memory.address, MIB)
    assert memory.allocated_bytes == MIB
    assert memory.bytes[4096] == 5


def test_a_refusal_names_the_memory_or_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, registrar = Memory(4 * MIB), FakeRegistrar(most_bytes=2 * MIB)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    with pytest.raises(StartError, match=r"beyond 0\.0 of 0\.0 GiB .*OUT_OF_MEMORY.*: lower") as e:
        pin_all(memory, registrar, max_bytes=MIB)
    assert e.value.code is ExitCode.UNAVAILABLE
    monkeypatch.setattr(resource, "getrlimit", lambda _: (MIB, MIB))
    with pytest.raises(StartError, match=r"the memlock limit is .*ulimit -l unlimited"):
        pin_all(memory, FakeRegistrar(most_bytes=MIB), max_bytes=MIB)
    assert not [t for t in threading.enumerate() if t.name.startswith("touch")]


def test_what_stops_the_progress_stops_the_pinning() -> None:
    def stop(frac: float) -> None:
        raise SystemExit(0)

    registrar = FakeRegistrar()
    memory = Memory(4 * MIB)
    registered: list[int] = []
    with pytest.raises(SystemExit):
        pin(
            memory.address,
            frame_chunks(4 * MIB, frame_bytes=MIB, max_bytes=MIB),
            registrar=registrar,
            cpus=frozenset(os.sched_getaffinity(0)),
            registered=registered,
            on_progress=stop,
        )
    assert registered == [memory.address]


def test_memory_that_is_not_free_is_refused(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:    2048 kB\n")
    check_memory(2 * MIB, allocated_bytes=0, root=tmp_path)
    check_memory(5 * MIB, allocated_bytes=4 * MIB, root=tmp_path)
    with pytest.raises(StartError, match="lower kv_dram_gib or free memory"):
        check_memory(3 * MIB, allocated_bytes=0, root=tmp_path)
    check_memory(1 << 60, allocated_bytes=0, root=tmp_path / "nothing")


def test_cpus_near_a_device(tmp_path: Path) -> None:
    allowed = frozenset(os.sched_getaffinity(0))
    one = min(allowed)
    device = tmp_path / "sys/bus/pci/devices/0000:65:00.0"
    device.mkdir(parents=True)
    nodes = tmp_path / "sys/devices/system/node"
    for node, cpus in ((0, f"{one},5000-5003\n"), (1, "5004\n")):
        (nodes / f"node{node}").mkdir(parents=True)
        (nodes / f"node{node}/cpulist").write_text(cpus)
    for node, expected in (("0", frozenset({one})), ("1", allowed), ("-1", allowed)):
        (device / "numa_node").write_text(f"{node}\n")
        assert cpus_near("0000:65:00.0", root=tmp_path) == expected
    assert cpus_near("0000:66:00.0", root=tmp_path) == allowed
    assert cpus_near(None) == allowed
