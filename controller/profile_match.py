"""How far a stored profile is good on this machine, for whoever lists profiles."""

from __future__ import annotations

from dataclasses import replace

from sparsed.controller.plan.gpus import rates_of
from sparsed.controller.start_values import site_here
from sparsed.core import MachineFacts, Profile, ProfileMatch
from sparsed.tuner.transfer import match_profile


def match_here(profile: Profile, machine: MachineFacts) -> ProfileMatch:
    """How far ``profile`` is good on this machine, for its own model and dtype: without the GPU
    where it was tuned without one."""
    if profile.key.hardware.startswith("cpu:"):
        machine = replace(machine, gpu_name=None, hbm_total_bytes=0)
    key = replace(profile.key, hardware=machine.fingerprint)
    here = site_here(key, profile.shape, machine)
    return match_profile(profile, here, rates_of=rates_of)
