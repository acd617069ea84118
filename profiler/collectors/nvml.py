"""The driver's library behind one door: opened late, and every call allowed to be missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from sparsed.core import GpuSlowdown, NvmlFault

MEMORY = "nvmlDeviceGetMemoryInfo"
_LASTING = (NvmlFault.NOT_SUPPORTED, NvmlFault.NO_PERMISSION, NvmlFault.NO_FUNCTION)
CLOCK_EVENTS = "nvmlDeviceGetCurrentClocksThrottleReasons"  # the older of its two names
_SLOWDOWNS = (  # bits of nvml.h; HW_SLOWDOWN comes with each of the other hardware ones
    (0x20 | 0x40, GpuSlowdown.THERMAL),
    (0x80, GpuSlowdown.POWER_BRAKE),
    (0x08, GpuSlowdown.HARDWARE),
)
_PROCESS_LISTS = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
)


class NvmlLibrary(Protocol):
    """The module ``pynvml``, or a fake with the functions a test needs."""

    NVMLError: type[Exception]

    def __getattr__(self, name: str) -> Any: ...


class GpuMemory(NamedTuple):
    """Device memory as the driver counts it; reserved memory is neither used nor free."""

    total_bytes: int
    used_bytes: int
    free_bytes: int


class ProcessMemory(NamedTuple):
    """Device memory of our own processes and of all others."""

    own_bytes: int
    others_bytes: int


class NvmlSession:
    """Calls by name. A call that the driver, the GPU or the binding does not offer is tried
    once and answers None from then on; one that fails for the moment answers None this time.
    ``fault`` tells why. Nothing of it raises.
    """

    def __init__(self, library: NvmlLibrary) -> None:
        self.library = library
        self._missing: set[str] = set()
        self._faults: dict[str, NvmlFault] = {}

    def call(self, name: str, *arguments: object) -> Any:
        """The call's result; None if it is not to be had."""
        if name in self._missing:
            return None
        try:
            result = getattr(self.library, name)(*arguments)
        except AttributeError:  # an older binding
            self._note(name, NvmlFault.NO_FUNCTION)
        except self.library.NVMLError as error:
            self._note(name, self.typed(getattr(error, "value", None)))
        else:
            self._faults.pop(name, None)
            return result
        return None

    def fault(self, *names: str) -> NvmlFault | None:
        """Why the first of these calls that failed when it was last tried did; None: none did."""
        return next((self._faults[name] for name in names if name in self._faults), None)

    def typed(self, code: int | None) -> NvmlFault:
        """What an error code of the library says."""
        library = self.library
        known = {
            library.NVML_ERROR_NOT_SUPPORTED: NvmlFault.NOT_SUPPORTED,
            library.NVML_ERROR_NO_PERMISSION: NvmlFault.NO_PERMISSION,
            library.NVML_ERROR_FUNCTION_NOT_FOUND: NvmlFault.NO_FUNCTION,
            library.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: NvmlFault.NO_FUNCTION,
            library.NVML_ERROR_GPU_IS_LOST: NvmlFault.GPU_LOST,
        }
        return NvmlFault.FAILED if code is None else known.get(code, NvmlFault.FAILED)

    def memory(self, handle: object) -> GpuMemory | None:
        """Version 2 of the call; version 1, on old drivers, counts reserved memory as used."""
        version = getattr(self.library, "nvmlMemory_v2", None)
        info = self.call(MEMORY, handle, version) if version else None
        if info is None:
            info = self._memory_v1(handle)
        return GpuMemory(info.total, info.used, info.free) if info is not None else None

    def process_memory(self, handle: object, *, own_pids: Iterable[int]) -> ProcessMemory | None:
        """None where the driver does not tell what each process has, or where none of ours is in
        its list: in a container it may count processes by the ids of the host."""
        lists = [self.call(name, handle) for name in _PROCESS_LISTS]
        found = {one.pid: one.usedGpuMemory for processes in lists for one in processes or ()}
        own = set(own_pids) & found.keys()
        if lists[0] is None or not own or None in found.values():
            return None
        own_bytes = sum(found[pid] for pid in own)
        return ProcessMemory(own_bytes, sum(found.values()) - own_bytes)

    def slowdown(self, handle: object) -> GpuSlowdown | None:
        """Why the clocks are cut, the first of several reasons; None: they are not, or nobody says."""
        bits = self.call(CLOCK_EVENTS, handle) or 0
        return next((reason for mask, reason in _SLOWDOWNS if bits & mask), None)

    def _memory_v1(self, handle: object) -> Any:
        try:  # not through ``call``, which remembers by name and would mix the versions up
            info = self.library.nvmlDeviceGetMemoryInfo(handle)
        except self.library.NVMLError as error:
            self._faults[MEMORY] = self.typed(getattr(error, "value", None))
            return None
        self._faults.pop(MEMORY, None)
        return info

    def _note(self, name: str, fault: NvmlFault) -> None:
        self._faults[name] = fault
        if fault in _LASTING:
            self._missing.add(name)


@contextmanager
def open_nvml(library: NvmlLibrary | None = None) -> Iterator[NvmlSession | None]:
    """A session for the length of the block; None where there is no binding or no driver."""
    library = library or _import_nvml()
    if library is None or not _initialised(library):
        yield None
        return
    try:
        yield NvmlSession(library)
    finally:
        library.nvmlShutdown()


def _import_nvml() -> NvmlLibrary | None:
    try:
        import pynvml
    except ImportError:
        return None
    library: NvmlLibrary = pynvml
    return library


def _initialised(library: NvmlLibrary) -> bool:
    try:
        library.nvmlInit()
    except library.NVMLError:
        return False
    return True
