"""The link between the tiers as calibrations are kept for it."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from sparsed import __version__
from sparsed.core import LinkCalibration, LinkKey, MachineFacts
from sparsed.db.store import LinkStore, StoreError

logger = logging.getLogger(__name__)


def link_key(machine: MachineFacts) -> LinkKey | None:
    """What decides how fast pages can be copied; None without a GPU."""
    if machine.gpu_name is None:
        return None
    generation, width = machine.pcie_generation, machine.pcie_width
    known = generation is not None and width is not None
    return LinkKey(
        gpu_name=machine.gpu_name,
        driver=machine.driver_version or "unknown",
        link=f"gen{generation}x{width}" if known else "unknown",
        torch=_version("torch"),
        triton=_version("triton"),
    )


def platform_versions(machine: MachineFacts) -> dict[str, str]:
    """What values that were measured here rest on, by the names that profiles have."""
    versions = {name: _version(name) for name in ("torch", "triton")}
    versions["sparsed"] = __version__
    if machine.gpu_name is not None and machine.driver_version is not None:
        versions["driver"] = machine.driver_version
    return versions


def keep_calibration(store: LinkStore, calibration: LinkCalibration | None) -> None:
    """Store what was measured, for the next start; a store that fails loses it, with a word."""
    if calibration is None:
        return
    try:
        store.save_calibration(replace(calibration, measured_at=time.time()))
    except StoreError as error:
        logger.warning("the calibration of the link is not kept: %s", error)


def _version(package: str) -> str:
    """Of an installed package, without loading it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
