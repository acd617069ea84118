"""``python -m sparsed.engine.measure``: reads ``{"MeasureDecode": {...}}`` or
``{"MeasureKernels": {...}}`` as JSON from its standard input and answers as ``engine.process``
says, with a ``DecodeReport`` or a ``KernelReport``."""

from __future__ import annotations

import sys

import msgspec

from sparsed.core import DecodeReport, ExitCode, KernelReport, MeasureDecode, MeasureKernels
from sparsed.engine.process import Progress, answer


def main() -> ExitCode:
    """Measure what standard input asks for; the exit status for the shell."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, msgspec.Raw])
    ((name, body),) = request.items()
    return answer(lambda report: _measure(name, body, on_progress=report))


def _measure(name: str, body: msgspec.Raw, *, on_progress: Progress) -> DecodeReport | KernelReport:
    on_progress("loading torch", 0.0)
    if name == "MeasureDecode":
        from sparsed.engine.measure.decode import measure_decode

        return measure_decode(
            msgspec.json.decode(body, type=MeasureDecode), on_progress=on_progress
        )
    from sparsed.engine.measure.kernels import measure_kernels

    return measure_kernels(msgspec.json.decode(body, type=MeasureKernels), on_progress=on_progress)


if __name__ == "__main__":
    sys.exit(main())
