"""The result of a study in the file that was asked for, with the memory of this GPU."""

from __future__ import annotations

from pathlib import Path

from sparsed.controller.startup import StartPlan
from sparsed.core import InputError, Profile, ProfileStatus
from sparsed.engine.workspace import plan_workspace
from sparsed.tuner.engines import DeviceMemory
from sparsed.tuner.export import ENGINE_OF, FORMAT_BY_SUFFIX, render_profile


def export_profile(profile: Profile, file: Path, *, plan: StartPlan) -> str:
    """Write it in the format of the suffix; returns what was written, in words. OSError."""
    format = FORMAT_BY_SUFFIX[file.suffix]
    memory = _device_memory(plan) if format in ENGINE_OF else None
    file.write_text(render_profile(profile, format=format, memory=memory), encoding="utf-8")
    what = "winner" if profile.status is ProfileStatus.VERIFIED else "default, which stays"
    return f"{file}: the {what}"


def _device_memory(plan: StartPlan) -> DeviceMemory | None:
    """None without a GPU, or where the estimates do not add up on it: the text then says that it
    bounds no memory, which is better than to lose a study at its end."""
    if not plan.machine.hbm_total_bytes:
        return None
    shape, spec = plan.model.shape, plan.spec
    workspace = plan_workspace(spec.knobs, shape=shape, dtype=spec.dtype)
    try:
        return DeviceMemory(
            device_bytes=plan.machine.hbm_total_bytes,
            weights_bytes=spec.plan.weights_bytes,
            workspace_bytes=workspace.total_bytes,
            kv_bytes=spec.plan.hot_bytes,
        )
    except InputError:
        return None
