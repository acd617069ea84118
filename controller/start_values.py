"""Which values a start takes: given ones, those of the live tuner, those of a profile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from sparsed import __version__
from sparsed.controller.config import DaemonConfig
from sparsed.controller.control import KnobSource
from sparsed.controller.links import platform_versions
from sparsed.controller.lookups import Finders
from sparsed.controller.plan.gpus import rates_of
from sparsed.controller.recovery import TunedValues, verdict_on
from sparsed.controller.seeds import load_seeds
from sparsed.core import (
    KNOB_SPECS,
    RECALL_KNOBS,
    InputError,
    Knobs,
    KnobValue,
    MachineFacts,
    MatchLevel,
    MemoryPlan,
    ModelShape,
    Profile,
    ProfileKey,
    RolloutRecord,
    Slo,
    UnprovedProfile,
)
from sparsed.tuner.drift import version_drift
from sparsed.tuner.export import mismatch
from sparsed.tuner.rollout_regime import LIVE_KNOBS
from sparsed.tuner.transfer import Found, Site, match_profile, nearest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    knobs: Knobs
    plan: MemoryPlan


Size = Callable[[Mapping[str, KnobValue]], Sized]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """``tuned``: values of the live tuner, over those of ``profile``; ``why`` says in words where
    all come from. ``left_out``: what was measured on other versions, in words, and
    ``stale_profile_id`` the profile among it. ``compatible``: a profile that may become
    ``unproved``, which the live tuner is to prove."""

    profile: Profile | None
    tuned: Mapping[str, KnobValue]
    why: str
    left_out: tuple[str, ...] = ()
    stale_profile_id: int | None = None
    compatible: Found | None = None
    unproved: UnprovedProfile | None = None

    @property
    def stale(self) -> str:
        if not self.left_out:
            return ""
        return f"{', '.join(self.left_out)}: measured on another platform; run: sparsed tune"


def warn_of_mismatch(config: DaemonConfig, key: ProfileKey) -> None:
    """Values tuned elsewhere are obeyed, but not without a word."""
    if config.tuned_for is not None:
        for line in mismatch(config.tuned_for, key, versions={"sparsed": __version__}):
            logger.warning("the config file was made for another place: %s", line)


def site_here(key: ProfileKey, shape: ModelShape | None, machine: MachineFacts) -> Site:
    rates = rates_of(machine.gpu_name) if machine.gpu_name else None
    return Site(key=key, shape=shape, versions=platform_versions(machine), rates=rates)


def _choose_profile(here: Site, *, finders: Finders) -> Chosen:
    """The key's own profile, if it was measured on these versions or an operator has pinned it.
    Else what is near is named, and one of this key, or a shipped one of it, is compatible."""
    own = finders.verified(here.key)
    own_match = own and match_profile(own, here, rates_of=rates_of)
    if own and own_match and (own.pinned or own_match.level is MatchLevel.EXACT):
        return Chosen(profile=own, tuned={}, why=_found_in_words(Found(own, own_match)))
    key = here.key
    none = f"none: no verified one for {key.model}, {key.dtype} on {key.hardware}"
    left_out = (f"profile {own.name} ({own_match.why})",) if own and own_match else ()
    stored = (*((own,) if own else ()), *finders.profiles(), *load_seeds())
    found = nearest(stored, here, rates_of=rates_of)
    is_compatible = found is not None and found.match.level is MatchLevel.COMPATIBLE
    if found is not None and not is_compatible:
        none = f"{none}; sparsed tune begins from {_found_in_words(found)}"
    return Chosen(
        profile=None,
        tuned={},
        why=none,
        left_out=left_out,
        stale_profile_id=own.profile_id if own else None,
        compatible=found if is_compatible else None,
    )


def _found_in_words(found: Found) -> str:
    return f"{_profile_in_words(found.profile)}; {found.match.level}: {found.match.why}"


def _profile_in_words(profile: Profile) -> str:
    name = f"{profile.name}, " if profile.name else ""
    name += f"pinned, {profile.status}" if profile.pinned else profile.status.value
    values = "".join(f"; {knob}={value}" for knob, value in profile.values.items())
    gain = profile.gain_frac
    evidence = ", no gain over the default proved"
    if gain is not None:
        evidence = f", {gain:+.1%} {profile.objective} over the default"
    return f"{name} for {profile.key.model} on {profile.workload}{evidence}{values}"


def find_values(
    size: Size, config: DaemonConfig, here: Site, *, finders: Finders
) -> tuple[Sized, Chosen]:
    """What a start takes, sized, and where all of it comes from."""
    chosen = _choose_values(config, here, finders=finders)
    sized, chosen = _size_values(size, config.knobs, chosen=chosen)
    return sized, _with_unproved(chosen, here=here, knobs=sized.knobs, given=config.knobs.keys())


def _choose_values(config: DaemonConfig, here: Site, *, finders: Finders) -> Chosen:
    """The last known good of the live tuner goes over the profile that it began from: one that is
    pinned or newer replaces it. In safe mode neither is taken. What was measured on other versions
    than these is left out, unless an operator has pinned it."""
    if config.no_profile:
        return Chosen(profile=None, tuned={}, why="none: --no-profile")
    tuned = finders.tuned(here.key)
    if tuned.is_safe:
        return Chosen(profile=None, tuned=tuned.values, why=f"none: {tuned.why}")
    if config.tuned_for is not None:
        why = f"from the config file: {_profile_in_words(config.tuned_for)}"
        chosen = Chosen(profile=None, tuned={}, why=why)
    else:
        chosen = _choose_profile(here, finders=finders)
    chosen = _with_tuned(chosen, _under_floor(tuned, config.slo), here=here)
    if chosen.stale:
        logger.warning("left out: %s", chosen.stale)
        chosen = replace(chosen, why=f"{chosen.why}; left out: {chosen.stale}")
    return _with_verdict(chosen, tuned.records, here=here)


def _under_floor(tuned: TunedValues, slo: Slo) -> TunedValues:
    """Without a floor of recall, without the values that were proved under one."""
    proved = sorted(RECALL_KNOBS & tuned.values.keys())
    if slo.min_recall is not None or not proved:
        return tuned
    values = {name: value for name, value in tuned.values.items() if name not in proved}
    why = f"{tuned.why}; but no {' and '.join(proved)}, as this start has no --min-recall"
    return replace(tuned, values=values, why=why)


def _with_tuned(chosen: Chosen, tuned: TunedValues, *, here: Site) -> Chosen:
    if not tuned.values:
        return chosen
    profile, compatible = chosen.profile, chosen.compatible
    if profile is not None and (profile.pinned or profile.created_at > tuned.moved_at):
        return replace(chosen, why=f"{chosen.why}; instead of {tuned.why}")
    if changed := version_drift(tuned.versions, here.versions):
        known = f"the last known good of the live tuner ({changed})"
        return replace(chosen, left_out=(*chosen.left_out, known))
    if compatible is not None and compatible.profile.created_at <= tuned.moved_at:
        compatible = None  # what was proved since on these versions need not make way for it
    why = f"{chosen.why}; then {tuned.why}"
    return replace(chosen, tuned=tuned.values, why=why, compatible=compatible)


def _with_verdict(chosen: Chosen, records: Sequence[RolloutRecord], *, here: Site) -> Chosen:
    """What was tested once on these versions is not tested again."""
    if chosen.compatible is None:
        return chosen
    record = verdict_on(_name_of_test(chosen.compatible.profile, here), records)
    if record is None:
        return chosen
    words = f"{_found_in_words(chosen.compatible)}; tested on these versions: {record.reason}"
    return replace(chosen, why=f"{chosen.why}; {words}", compatible=None)


def _name_of_test(profile: Profile, here: Site) -> str:
    """Of ``profile`` on these versions: others ask for another test."""
    versions = (f"{name} {version}" for name, version in sorted(here.versions.items()))
    return f"profile {profile.name} on {', '.join(versions)}"


def _with_unproved(chosen: Chosen, *, here: Site, knobs: Knobs, given: AbstractSet[str]) -> Chosen:
    """With what of the compatible profile the live tuner may set: knobs of its own that are
    otherwise in ``knobs``, those of this start, and not among the ``given`` ones."""
    if chosen.compatible is None:
        return chosen
    profile, match = chosen.compatible
    values = {
        name: value
        for name, value in profile.values.items()
        if name in LIVE_KNOBS and name not in given and value != getattr(knobs, name)
    }
    name, words = _name_of_test(profile, here), _found_in_words(chosen.compatible)
    try:
        knobs.with_values(values)
    except InputError as error:
        return replace(chosen, why=f"{chosen.why}; {words}; does not fit this start ({error})")
    if not values:
        why = f"{chosen.why}; {words}; nothing in it for the live tuner to try"
        return replace(chosen, why=why)
    why = f"{chosen.why}; {words}; the first candidate of the tuner in mode auto"
    unproved = UnprovedProfile(name=name, values=values, why=match.why)
    return replace(chosen, why=why, unproved=unproved)


def _size_values(
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
