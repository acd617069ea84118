"""psutil's view: our own processes, and the host they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import psutil

from sparsed.core import HostGauges


class HostCollector:
    """Memory and CPU of the given processes and of the host.

    ``read_pids`` names the processes to add up (controller and engine) and is asked every time,
    since a restarted engine has another id. CPU shares cover the time since the call before;
    they are None on the first one, and of a process seen for the first time they count as 0.
    """

    def __init__(self, read_pids: Callable[[], Iterable[int]]) -> None:
        self._read_pids = read_pids
        self._processes: dict[int, psutil.Process] = {}
        self._primed = False

    def fill(self, gauges: HostGauges) -> HostGauges:
        self._follow_processes()
        rss_bytes, cpu_frac = self._read_processes()
        host_cpu_frac = psutil.cpu_percent(None) / 100
        filled = replace(
            gauges,
            process_rss_bytes=rss_bytes,
            process_cpu_frac=cpu_frac if self._primed else None,
            host_cpu_frac=host_cpu_frac if self._primed else None,
            host_free_bytes=psutil.virtual_memory().available,
        )
        self._primed = True
        return filled

    def _follow_processes(self) -> None:
        known, self._processes = self._processes, {}
        for pid in self._read_pids():
            try:
                process = known.get(pid) or psutil.Process(pid)
                if process.is_running():  # false if the id now belongs to another process
                    self._processes[pid] = process
            except psutil.NoSuchProcess:
                continue

    def _read_processes(self) -> tuple[int | None, float | None]:
        rss_bytes, cpu_frac, num_read = 0, 0.0, 0
        for process in self._processes.values():
            try:
                with process.oneshot():
                    rss_bytes += process.memory_info().rss
                    cpu_frac += process.cpu_percent(None) / 100
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            num_read += 1
        return (rss_bytes, cpu_frac) if num_read else (None, None)
