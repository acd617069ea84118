"""Which values a start takes: given ones, those of the live tuner, those of a profile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sparsed import __version__
from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource
from sparsed.controller.lookups import FindTuned, FindVerified, profiles_of, tuned_of
from sparsed.core import (
    KNOB_SPECS,
    InputError,
    Knobs,
    KnobValue,
    MemoryPlan,
    Profile,
    ProfileKey,
)
from sparsed.tuner.export import mismatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    knobs: Knobs
    plan: MemoryPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """``tuned``: values of the live tuner, over those of ``profile``; ``why`` says in words where
    all come from."""

    profile: Profile | None
    tuned: Mapping[str, KnobValue]
    why: str


def warn_of_mismatch(config: DaemonConfig, key: ProfileKey) -> None:
    """Values tuned elsewhere are obeyed, but not without a word."""
    if config.tuned_for is not None:
        for line in mismatch(config.tuned_for, key, versions={"sparsed": __version__}):
            logger.warning("the config file was made for another place: %s", line)


def _choose_profile(
    config: DaemonConfig, key: ProfileKey, *, find_verified: FindVerified | None
) -> tuple[Profile | None, str]:
    if config.no_profile:
        return None, "none: --no-profile"
    if config.tuned_for is not None:
        return None, f"from the config file: {_profile_in_words(config.tuned_for)}"
    profile = (find_verified or profiles_of(config.state_dir))(key)
    if profile is None:
        return None, f"none: no verified one for {key.model}, {key.dtype} on {key.hardware}"
    return profile, _profile_in_words(profile)


def _profile_in_words(profile: Profile) -> str:
    name = f"#{profile.profile_id}, " if profile.profile_id else ""
    name += f"pinned, {profile.status}" if profile.pinned else profile.status.value
    values = "".join(f"; {knob}={value}" for knob, value in profile.values.items())
    gain = profile.gain_frac
    evidence = ", no gain over the default proved"
    if gain is not None:
        evidence = f", {gain:+.1%} {profile.objective} over the default"
    return f"{name} for {profile.key.model} on {profile.workload}{evidence}{values}"


def choose_values(
    config: DaemonConfig,
    key: ProfileKey,
    *,
    find_verified: FindVerified | None,
    find_tuned: FindTuned | None,
) -> Chosen:
    """The last known good of the live tuner goes over the profile that it began from: one that is
    pinned or newer replaces it. In safe mode neither is taken."""
    profile, why = _choose_profile(config, key, find_verified=find_verified)
    if config.no_profile:
        return Chosen(profile=None, tuned={}, why=why)
    tuned = (find_tuned or tuned_of(config.state_dir))(key)
    if tuned.is_safe:
        return Chosen(profile=None, tuned=tuned.values, why=f"none: {tuned.why}")
    if not tuned.values:
        return Chosen(profile=profile, tuned={}, why=why)
    if profile is not None and (profile.pinned or profile.created_at > tuned.moved_at):
        return Chosen(profile=profile, tuned={}, why=f"{why}; instead of {tuned.why}")
    return Chosen(profile=profile, tuned=tuned.values, why=f"{why}; then {tuned.why}")


def size_values(
    size: Callable[[Mapping[str, KnobValue]], Sized],
    explicit: Mapping[str, KnobValue],
    *,
    chosen: Chosen,
) -> tuple[Sized, Chosen]:
    """Explicit values win over all others; what no longer fits is left out: first the live
    tuner's, then the profile."""
    profile = chosen.profile
    from_profile = profile.values if profile else {}
    if chosen.tuned:
        try:
            return size({**from_profile, **chosen.tuned, **explicit}), chosen
        except InputError as error:
            why = f"{chosen.why}, which does not fit this start ({error})"
            logger.warning("values of the live tuner left out: %s", why)
            chosen = replace(chosen, tuned={}, why=why)
    if profile is not None:
        try:
            return size({**from_profile, **explicit}), chosen
        except InputError as error:
            why = f"none: #{profile.profile_id} does not fit this start ({error})"
            logger.warning("profile left out: %s", why)
            chosen = replace(chosen, profile=None, why=why)
    return size(explicit), chosen


def find_sources(config: DaemonConfig, *, chosen: Chosen) -> dict[str, KnobSource]:
    """Where the value of every knob comes from."""
    from_profile = chosen.profile.values if chosen.profile else {}
    sources = {}
    for spec in KNOB_SPECS:
        if spec.name in config.knobs:
            sources[spec.name] = config.origin(spec.name)
        elif spec.name in chosen.tuned:
            sources[spec.name] = KnobSource.TUNER
        elif spec.name in from_profile:
            sources[spec.name] = KnobSource.PROFILE
        else:
            from_machine = spec.default is None and not spec.auto
            sources[spec.name] = KnobSource.MACHINE if from_machine else KnobSource.DEFAULT
    return sources
