"""What the driver of a GPU tells of its memory while a daemon starts and serves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, Self

from sparsed.profiler.collectors.nvml import NvmlSession, open_nvml

SAMPLE_S: Final = 0.05
LINE: Final = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) INFO ([a-zA-Z ]+)(, \d+ %)?$")

# Both at one instant, in a process with a CUDA context and nothing else.
BOTH_FREE: Final = """
import json, sys, torch
from sparsed.profiler.collectors.nvml import open_nvml
with open_nvml() as nvml:
    handle = nvml.call("nvmlDeviceGetHandleByIndex", int(sys.argv[1]))
    before = nvml.memory(handle).free_bytes
    torch.cuda.set_device(int(sys.argv[1]))
    torch.cuda.synchronize()
    cuda, total = torch.cuda.mem_get_info()
    memory = nvml.memory(handle)
    print(json.dumps({"cuda_free_bytes": cuda, "cuda_total_bytes": total,
        "nvml_free_bytes": memory.free_bytes, "nvml_total_bytes": memory.total_bytes,
        "nvml_used_bytes": memory.used_bytes, "context_bytes": before - memory.free_bytes}))
"""


class Driver:
    """Samples the driver's counts beside the load; nothing is told where there is none."""

    def __init__(self, nvml: NvmlSession | None, *, index: int | None) -> None:
        self.samples: list[tuple[float, int]] = []  # seconds since the epoch, bytes used by all
        self.own_peak_bytes = 0
        self.pid: int | None = None
        self._nvml = nvml
        self._handle = None
        if nvml is not None and index is not None:
            self._handle = nvml.call("nvmlDeviceGetHandleByIndex", index)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def used_bytes(self) -> int | None:
        if self._nvml is None or self._handle is None:
            return None
        memory = self._nvml.memory(self._handle)
        return memory.total_bytes - memory.free_bytes if memory else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(SAMPLE_S):
            used = self.used_bytes()
            if used is not None:
                self.samples.append((time.time(), used))
            if self._nvml is not None and self._handle is not None and self.pid is not None:
                own = self._nvml.process_memory(self._handle, own_pids=[self.pid])
                self.own_peak_bytes = max(self.own_peak_bytes, own.own_bytes if own else 0)


def phases(log: Path, samples: Sequence[tuple[float, int]], *, ready_at: float) -> dict[str, int]:
    """Bytes in use at the end of each phase of a start, by the times in the daemon's log."""
    starts: dict[str, float] = {}
    for line in log.read_text().splitlines():
        if found := LINE.match(line):
            starts.setdefault(found[2], datetime.fromisoformat(found[1]).timestamp())
    ends = [*list(starts.values())[1:], ready_at]
    used = {}
    for name, end in zip(starts, ends, strict=True):
        until = [num_bytes for at, num_bytes in samples if at <= end]
        if until:
            used[name] = until[-1]
    return used


@contextmanager
def driver(index: int | None) -> Iterator[Driver]:
    with open_nvml() as nvml, Driver(nvml, index=index) as counts:
        yield counts


def both_free(index: int) -> dict[str, int]:
    """Free memory as CUDA and as the driver tell it, and what a bare CUDA context takes."""
    command = (sys.executable, "-c", BOTH_FREE, str(index))
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told: dict[str, int] = json.loads(text)
    return told
