"""GPUs that a plan can be made for, and what they carry.

The H100's rates were measured (benchmarks/results/h100-kernels.json and h100-link.json). Those of the
others are figures of their data sheets, times the share of its own that the H100 reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sparsed.core import GpuRates, InputError, MachineFacts

MIB: Final = 1 << 20
# Bytes per second of sixteen lanes, each way, with nothing taken off for packets.
PCIE_BYTES_PER_S: Final[Mapping[int, float]] = MappingProxyType({4: 31.5e9, 5: 63.0e9})

_H100 = GpuRates(
    name="H100 SXM 80GB",
    hbm_bytes=81559 * MIB,
    copy_bytes_per_s=3.006e12,
    link_bytes_per_s=50.06e9,
    matmul_flop_per_s=805e12,
    is_measured=True,
)
_HBM_SHARE: Final = _H100.copy_bytes_per_s / 3.35e12
_LINK_SHARE: Final = _H100.link_bytes_per_s / PCIE_BYTES_PER_S[5]
_MATMUL_SHARE: Final = _H100.matmul_flop_per_s / 989e12


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownGpu:
    """``driver_names``: parts of the name that the driver has for it."""

    rates: GpuRates
    driver_names: tuple[str, ...]


def _by_data_sheet(
    name: str,
    *driver_names: str,
    hbm_mib: int,
    hbm_bytes_per_s: float,
    pcie_generation: int,
    flop_per_s: float,
) -> KnownGpu:
    """``flop_per_s``: dense, bfloat16 with sums in float32."""
    return KnownGpu(
        rates=GpuRates(
            name=name,
            hbm_bytes=hbm_mib * MIB,
            copy_bytes_per_s=hbm_bytes_per_s * _HBM_SHARE,
            link_bytes_per_s=PCIE_BYTES_PER_S[pcie_generation] * _LINK_SHARE,
            matmul_flop_per_s=flop_per_s * _MATMUL_SHARE,
            is_measured=False,
        ),
        driver_names=driver_names,
    )


GPUS: Final[Mapping[str, KnownGpu]] = MappingProxyType(
    {
        "h100": KnownGpu(rates=_H100, driver_names=("H100 80GB HBM3",)),
        "h200": _by_data_sheet(
            "H200 SXM 141GB",
            "H200",
            hbm_mib=143771,
            hbm_bytes_per_s=4.8e12,
            pcie_generation=5,
            flop_per_s=989e12,
        ),
        "a100-80gb": _by_data_sheet(
            "A100 SXM 80GB",
            "A100-SXM4-80GB",
            hbm_mib=81920,
            hbm_bytes_per_s=2.039e12,
            pcie_generation=4,
            flop_per_s=312e12,
        ),
        "a100-40gb": _by_data_sheet(
            "A100 SXM 40GB",
            "A100-SXM4-40GB",
            hbm_mib=40960,
            hbm_bytes_per_s=1.555e12,
            pcie_generation=4,
            flop_per_s=312e12,
        ),
        "l40s": _by_data_sheet(
            "L40S 48GB",
            "L40S",
            hbm_mib=46068,
            hbm_bytes_per_s=0.864e12,
            pcie_generation=4,
            flop_per_s=362e12,
        ),
        "rtx-4090": _by_data_sheet(
            "RTX 4090 24GB",
            "RTX 4090",
            hbm_mib=24564,
            hbm_bytes_per_s=1.008e12,
            pcie_generation=4,
            flop_per_s=165e12,
        ),
    }
)


def named_gpu(name: str) -> GpuRates:
    """The rates of ``--gpu NAME``; InputError listing the names."""
    known = GPUS.get(name.strip().lower().replace(" ", "-").replace("_", "-"))
    if known is None:
        raise InputError(f"--gpu {name!r} is not known; known: {', '.join(GPUS)}", field="gpu")
    return known.rates


def rates_of(driver_name: str) -> GpuRates | None:
    """The rates of the GPU that its driver calls so; None: not known."""
    for known in GPUS.values():
        if any(part in driver_name for part in known.driver_names):
            return known.rates
    return None


def gpu_of(machine: MachineFacts) -> GpuRates:
    """The rates of the GPU of this machine; InputError if there is none, or an unknown one."""
    if machine.gpu_name is None:
        raise InputError(
            f"this machine has no GPU to plan for; name one with --gpu: {', '.join(GPUS)}",
            field="gpu",
        )
    if (rates := rates_of(machine.gpu_name)) is not None:
        return rates
    raise InputError(
        f"the rates of {machine.gpu_name} are not known; plan for one of: {', '.join(GPUS)}, with "
        "--gpu",
        field="gpu",
    )
