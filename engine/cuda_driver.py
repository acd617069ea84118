"""The calls of the CUDA driver that torch does not offer, through ctypes: no toolchain needed.

The driver, unlike the runtime, keeps no error of a failed call for the next one to trip over.
Calls release the interpreter's lock. A context must be current on the calling thread, which it
is once torch has used the device there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

_SUCCESS: Final = 0
_PORTABLE_AND_MAPPED: Final = 1 | 2  # CU_MEMHOSTREGISTER_PORTABLE, _DEVICEMAP
_IN_STREAM_ORDER: Final = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: a source is written before it
_PCI_ID_CHARACTERS: Final = 16
_BATCH_VERSION: Final = 12080
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
# targets, sources, sizes, count, attributes, their first copies, how many, failed copy, stream
_BATCH: Final = ctypes.CFUNCTYPE(
    *(ctypes.c_int, _POINTER, _POINTER, _POINTER, _SIZE),
    *(_POINTER, _POINTER, _SIZE, _POINTER, _POINTER),
)


class CudaError(Exception):
    """A driver call failed; ``code`` is its CUresult."""

    def __init__(self, call: str, *, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.code = code


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes; the location hints stay zero, for they concern managed memory."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class CudaDriver:
    """``library``: the driver, loaded; a fake in tests. Errors: OSError without a driver."""

    def __init__(self, library: Any = None) -> None:
        self._library = library if library is not None else ctypes.CDLL("libcuda.so.1")
        self._batch = self._find_batch()

    def register(self, address: int, num_bytes: int) -> None:
        """Pin memory of this process and give the GPU access to it. CudaError if it refuses."""
        size = ctypes.c_size_t(num_bytes)
        code = self._library.cuMemHostRegister_v2(
            ctypes.c_void_p(address), size, ctypes.c_uint(_PORTABLE_AND_MAPPED)
        )
        self._check("cuMemHostRegister", code)

    def unregister(self, address: int) -> None:
        """Unpin what began at ``address``; a context that is gone has done so already."""
        self._library.cuMemHostUnregister(ctypes.c_void_p(address))

    def pci_id(self, device_index: int) -> str:
        """Address of a device as the kernel writes it, ``0000:65:00.0``."""
        text = ctypes.create_string_buffer(_PCI_ID_CHARACTERS)
        code = self._library.cuDeviceGetPCIBusId(
            text, ctypes.c_int(_PCI_ID_CHARACTERS), ctypes.c_int(device_index)
        )
        self._check("cuDeviceGetPCIBusId", code)
        return text.value.decode().lower()

    def copy_each(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], *, stream: int
    ) -> None:
        """Queue one copy for every triple of addresses and bytes on ``stream``."""
        copy, handle = self._library.cuMemcpyAsync, ctypes.c_void_p(stream)
        for target, source, size in zip(targets, sources, sizes, strict=True):
            code = copy(
                ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size), handle
            )
            self._check("cuMemcpyAsync", code)

    def copy_batch(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], *, stream: int
    ) -> None:
        """As ``copy_each``, in one call from driver 12.8 on; ``stream`` not the default one.

        The order among the copies is open; each reads its source in the order of the stream.
        """
        if self._batch is None:
            self.copy_each(targets, sources, sizes, stream=stream)
        elif targets:
            code = _call_batch(self._batch, targets, sources, sizes, stream)
            self._check("cuMemcpyBatchAsync", code)

    def _find_batch(self) -> Any:
        """The call with the signature of CUDA 12.8, which later drivers give to who asks for it;
        None for a driver that has none."""
        find = getattr(self._library, "cuGetProcAddress_v2", None)
        if find is None:
            return None
        address, found = ctypes.c_void_p(), ctypes.c_int()
        code = find(
            b"cuMemcpyBatchAsync",
            ctypes.byref(address),
            ctypes.c_int(_BATCH_VERSION),
            ctypes.c_uint64(0),
            ctypes.byref(found),
        )
        return _BATCH(address.value) if code == _SUCCESS and address.value else None

    def _check(self, call: str, code: int) -> None:
        if code == _SUCCESS:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
        raise CudaError(call, code=code, name=(text.value or b"unknown error").decode())


def _call_batch(
    function: Any,
    targets: Sequence[int],
    sources: Sequence[int],
    sizes: Sequence[int],
    stream: int,
) -> int:
    count = len(targets)
    attributes = _CopyAttributes(source_access_order=_IN_STREAM_ORDER)
    first_with_attributes, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
    code: int = function(
        (ctypes.c_uint64 * count)(*targets),
        (ctypes.c_uint64 * count)(*sources),
        (ctypes.c_size_t * count)(*sizes),
        count,
        ctypes.byref(attributes),
        ctypes.byref(first_with_attributes),
        1,
        ctypes.byref(failed),
        stream,
    )
    return code
