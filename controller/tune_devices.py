"""The devices of a study: which were asked for, and what an engine on each is started with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsed.controller.config import DaemonConfig
from sparsed.controller.startup import Progress, StartPlan, prepare
from sparsed.core import GIB, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One device of a study."""

    config: DaemonConfig
    plan: StartPlan


def split_devices(given: str) -> tuple[str, ...]:
    """``cuda:0,cuda:1`` as a tuple of its parts; whatever has no comma is left as it is.

    InputError: a list of anything but GPUs by their numbers, or with one of them twice.
    """
    if "," not in given:
        return (given,)
    devices = tuple(part.strip() for part in given.split(","))
    for device in devices:
        if not re.fullmatch(r"cuda:\d{1,3}", device):
            raise InputError(
                f"--device {given}: {device!r} may not stand in a list; list GPUs by their numbers, "
                "as cuda:0,cuda:1, or give one device",
                field="device",
            )
    numbers = [int(device.partition(":")[2]) for device in devices]
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--device {given}: a GPU is listed twice; list each once", field="device")
    return devices


def prepare_places(
    config: DaemonConfig, devices: Sequence[str], *, progress: Progress
) -> tuple[Place, ...]:
    """One place for each of ``devices``, all with the same knobs: those of the device with the
    least free memory, with an equal part of the host's memory for each.

    Errors: those of ``prepare``; InputError for devices that are not alike.
    """
    configs = [replace(config, device=device) for device in devices]
    plans = [prepare(item, progress=progress, num_engines=len(devices)) for item in configs]
    for plan in plans[1:]:
        _check_alike(plans[0], plan)
    least = min(plans, key=lambda plan: plan.machine.hbm_free_bytes)
    spec = least.spec
    return tuple(
        Place(
            config=item,
            plan=replace(
                plan,
                spec=replace(plan.spec, knobs=spec.knobs, plan=spec.plan),
                machine=least.machine,
            ),
        )
        for item, plan in zip(configs, plans, strict=True)
    )


def share_in_words(plan: StartPlan, *, num_engines: int) -> str:
    """What several engines like that of ``plan`` take of the host together, for the user."""
    gib = plan.spec.plan.dram_pool_bytes / GIB
    return (
        f"{num_engines} engines share the memory and the links of this host: each pins {gib:.3g} "
        f"GiB, {num_engines * gib:.3g} GiB in all; the default, and the verification, run alone on "
        f"{plan.spec.device}"
    )


def _check_alike(first: StartPlan, other: StartPlan) -> None:
    if first.key.hardware != other.key.hardware:
        raise InputError(
            f"--device: {other.spec.device} is another GPU ({other.key.hardware}) than "
            f"{first.spec.device} ({first.key.hardware}), and trials on both would not compare; "
            "list GPUs of one kind, or tune each kind in a run of its own",
            field="device",
        )
