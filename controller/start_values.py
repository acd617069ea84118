"""Which values a start takes: given ones, those of the live tuner, those of a profile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

from sparsed import __version__
from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource
from sparsed.controller.lookups import FindProfiles, FindTuned, FindVerified
from sparsed.controller.plan.gpus import rates_of
from sparsed.controller.recovery import verdict_on
from sparsed.controller.seeds import load_seeds
from sparsed.core import (
    KNOB_SPECS,
    InputError,
    KnobClass,
    Knobs,
    KnobValue,
    MachineFacts,
    MatchLevel,
    MemoryPlan,
    ModelShape,
    Profile,
    ProfileKey,
    RolloutRecord,
    RolloutState,
    UnprovedValues,
)
from sparsed.tuner.export import mismatch
from sparsed.tuner.transfer import Platform, nearest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    knobs: Knobs
    plan: MemoryPlan


Size = Callable[[Mapping[str, KnobValue]], Sized]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """``tuned``: values of the live tuner, over those of ``profile``; ``why`` says in words where
    all come from. ``unproved``: who a test of the profile is initiated by, empty if it needs
    none."""

    profile: Profile | None
    tuned: Mapping[str, KnobValue]
    why: str
    unproved: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finders:
    """Where values are looked for. ``verified``: the profile of a key; ``profiles``: all that are
    stored; ``tuned``: what the live tuner left."""

    verified: FindVerified
    profiles: FindProfiles
    tuned: FindTuned


def warn_of_mismatch(config: DaemonConfig, key: ProfileKey) -> None:
    """Values tuned elsewhere are obeyed, but not without a word."""
    if config.tuned_for is not None:
        for line in mismatch(config.tuned_for, key, versions={"sparsed": __version__}):
            logger.warning("the config file was made for another place: %s", line)


def installed_versions() -> dict[str, str]:
    """Of what decides over speed, as far as it is installed, without loading any of it."""
    versions = {"sparsed": __version__}
    for name in ("torch", "triton"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def platform_here(key: ProfileKey, shape: ModelShape | None, machine: MachineFacts) -> Platform:
    rates = rates_of(machine.gpu_name) if machine.gpu_name else None
    return Platform(key=key, shape=shape, versions=installed_versions(), rates=rates)


def _choose_profile(
    here: Platform, *, finders: Finders, records: Sequence[RolloutRecord]
) -> Chosen:
    """The key's own profile, else one that ships with the package. What a test on this platform
    has reverted is left out, unless it is pinned."""
    own = finders.verified(here.key)
    stored = (*((own,) if own else finders.profiles()), *load_seeds())
    reverted = [item for item in stored if _is_reverted(item, here, records=records)]
    usable = [item for item in stored if item not in reverted]
    found = nearest(usable, here, rates_of=rates_of)
    key = here.key
    none = f"none: no verified one for {key.model}, {key.dtype} on {key.hardware}"
    if reverted:
        none += f"; {reverted[0].name} was compared with the default and reverted"
    if found is None:
        return Chosen(profile=None, tuned={}, why=none)
    profile, match = found
    words = f"{_profile_in_words(profile)}; {match.level}: {match.why}"
    if match.level is MatchLevel.TRANSFER:
        why = f"{none}; sparsed tune begins from {words}"
        return Chosen(profile=None, tuned={}, why=why)
    name = initiator(profile, here)
    needs_test = match.level is MatchLevel.COMPATIBLE and not profile.pinned
    if not needs_test or verdict_on(name, records) is not None:
        return Chosen(profile=profile, tuned={}, why=words)
    why = f"{words}; unverified here until mode auto has compared it with the default"
    return Chosen(profile=profile, tuned={}, why=why, unproved=name)


def initiator(profile: Profile, here: Platform) -> str:
    """Who initiates a test of ``profile``: other versions ask for another one."""
    versions = (f"{name} {version}" for name, version in sorted(here.versions.items()))
    return f"profile {', '.join((profile.name, *versions))}"


def _is_reverted(profile: Profile, here: Platform, *, records: Sequence[RolloutRecord]) -> bool:
    verdict = verdict_on(initiator(profile, here), records)
    return not profile.pinned and verdict is not None and verdict.state is RolloutState.REVERTED


def _profile_in_words(profile: Profile) -> str:
    name = f"{profile.name}, " if profile.name else ""
    name += f"pinned, {profile.status}" if profile.pinned else profile.status.value
    values = "".join(f"; {knob}={value}" for knob, value in profile.values.items())
    gain = profile.gain_frac
    evidence = ", no gain over the default proved"
    if gain is not None:
        evidence = f", {gain:+.1%} {profile.objective} over the default"
    return f"{name} for {profile.key.model} on {profile.workload}{evidence}{values}"


def choose_values(config: DaemonConfig, here: Platform, *, finders: Finders) -> Chosen:
    """The last known good of the live tuner goes over the profile that it began from: one that is
    pinned or newer replaces it. In safe mode neither is taken."""
    if config.no_profile:
        return Chosen(profile=None, tuned={}, why="none: --no-profile")
    tuned = finders.tuned(here.key)
    if tuned.is_safe:
        return Chosen(profile=None, tuned=tuned.values, why=f"none: {tuned.why}")
    if config.tuned_for is not None:
        why = f"from the config file: {_profile_in_words(config.tuned_for)}"
        chosen = Chosen(profile=None, tuned={}, why=why)
    else:
        chosen = _choose_profile(here, finders=finders, records=tuned.records)
    if not tuned.values:
        return chosen
    profile, why = chosen.profile, chosen.why
    if profile is not None and (profile.pinned or profile.created_at > tuned.moved_at):
        return replace(chosen, why=f"{why}; instead of {tuned.why}")
    return replace(chosen, tuned=tuned.values, why=f"{why}; then {tuned.why}")


def find_unproved(
    size: Size, explicit: Mapping[str, KnobValue], *, chosen: Chosen, knobs: Knobs
) -> UnprovedValues | None:
    """What of ``knobs``, which are those of the start, is to be tested, and against what: the hot
    ones that are others than without the profile. What waits for a restart stays on both sides."""
    if chosen.profile is None or not chosen.unproved:
        return None
    hot = {spec.name for spec in KNOB_SPECS if spec.klass is KnobClass.HOT}
    others = {n: value for n, value in chosen.profile.values.items() if n not in hot}
    try:
        without = size({**others, **chosen.tuned, **explicit}).knobs
    except InputError:  # what waits for a restart fits only together with the rest
        return None
    changed = [
        name
        for name in chosen.profile.values
        if name in hot and getattr(knobs, name) != getattr(without, name)
    ]
    if not changed:
        return None
    return UnprovedValues(
        profile=chosen.unproved,
        config_from={name: getattr(without, name) for name in changed},
        config_to={name: getattr(knobs, name) for name in changed},
    )


def size_values(
    size: Size,
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
            why = f"none: {profile.name} does not fit this start ({error})"
            logger.warning("profile left out: %s", why)
            chosen = replace(chosen, profile=None, why=why, unproved="")
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
