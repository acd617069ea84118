"""How far a stored profile is good for another platform, and what its values come to there; pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from sparsed.core import (
    DTYPE_BYTES,
    GIB,
    KNOBS_BY_NAME,
    GpuRates,
    KnobValue,
    MatchLevel,
    ModelShape,
    Profile,
    ProfileKey,
    ProfileMatch,
    ProfileStatus,
)
from sparsed.tuner.drift import version_drift

FINGERPRINT: Final = re.compile(r"(?P<kind>gpu|cpu):(?P<name>.*):(?P<gib>\d{1,6})GiB", re.DOTALL)
MAX_OCTAVES: Final = 4.0  # a factor of sixteen in one feature; not measured, a bound on folly
UNKNOWN_OCTAVES: Final = 1.0  # what a feature counts that is not known of both
LEVELS: Final = tuple(MatchLevel)
PROVED: Final = (ProfileStatus.VERIFIED, ProfileStatus.STALE)  # the latter once upon a time
SHIPPED: Final = "it ships with sparsed and was not measured here"
STALE: Final = "it was left out once, for what it was measured on had changed"

Values = Mapping[str, KnobValue]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A machine and a model, as far as they are known without measuring anything. ``shape`` and
    ``rates`` (of the GPU) None: not known."""

    key: ProfileKey
    versions: Mapping[str, str]
    shape: ModelShape | None = None
    rates: GpuRates | None = None


class Found(NamedTuple):
    profile: Profile
    match: ProfileMatch


RatesOf = Callable[[str], GpuRates | None]


def site_of(profile: Profile, *, rates_of: RatesOf) -> Site:
    """Where ``profile`` was tuned. ``rates_of``: those of the GPU of a driver's name."""
    kind, name, _ = _parts(profile.key)
    return Site(
        key=profile.key,
        versions=profile.versions,
        shape=profile.shape,
        rates=rates_of(name) if kind == "gpu" else None,
    )


def match(there: Site, here: Site) -> ProfileMatch:
    """How far what was tuned ``there`` is good ``here``. Versions count where both are known."""
    if there.key == here.key:
        changes = version_drift(there.versions, here.versions)
        level = MatchLevel.COMPATIBLE if changes else MatchLevel.EXACT
        return ProfileMatch(level=level, why=changes or "same hardware, model, dtype and versions")
    kinds = [_parts(platform.key)[0] for platform in (there, here)]
    if kinds[0] != kinds[1] or not kinds[0]:
        why = f"hardware of another kind: {there.key.hardware}"
        return ProfileMatch(level=MatchLevel.NONE, why=why, distance=math.inf)
    octaves = distance(there, here)
    why = f"{'; '.join(_changed_keys(there, here))}; {octaves:.1f} octaves away"
    level = MatchLevel.TRANSFER if octaves <= MAX_OCTAVES else MatchLevel.NONE
    return ProfileMatch(level=level, why=why, distance=octaves)


def match_profile(profile: Profile, here: Site, *, rates_of: RatesOf) -> ProfileMatch:
    """As ``match``; what ships with the package, and what is stale, is compatible at the most."""
    found = match(site_of(profile, rates_of=rates_of), here)
    if profile.seed is not None and found.level is MatchLevel.COMPATIBLE:
        return replace(found, why=f"{SHIPPED}; {found.why}")
    doubt = STALE if profile.status is ProfileStatus.STALE else ""
    doubt = SHIPPED if profile.seed is not None else doubt
    if not doubt or found.level is not MatchLevel.EXACT:
        return found
    return ProfileMatch(level=MatchLevel.COMPATIBLE, why=doubt)


def nearest(profiles: Sequence[Profile], here: Site, *, rates_of: RatesOf) -> Found | None:
    """The profile to begin from, of those that are pinned or were ever verified: the best level,
    there the pinned one, the nearest, one that was measured here, the newest. None: none is near
    enough."""
    usable = [item for item in profiles if item.pinned or item.status in PROVED]
    found = [Found(item, match_profile(item, here, rates_of=rates_of)) for item in usable]
    near = [item for item in found if item.match.level is not MatchLevel.NONE]
    return min(near, key=_rank, default=None)


def distance(there: Site, here: Site) -> float:
    """Root of the summed squares of the octaves between the features of two platforms of the same
    kind: bytes and rate of the memory, rate of the link, layers, KV heads, head size, bytes of a
    number. What is not known of both counts an octave, unless it cannot differ."""
    return math.sqrt(sum(octaves**2 for octaves in _octaves(there, here)))


def carry_over(values: Values, *, there: Site, here: Site) -> dict[str, KnobValue]:
    """What ``values`` tuned ``there`` come to ``here``: the same in ratios that have no dimension.

    A page keeps its bytes, the requests at once their share of the tokens that the memory has room
    for beside the weights. Tokens (budgets, chunk) stand against lengths of the workload, which a
    platform does not change, and shares are shares. What cannot be told is left as it is.
    """
    carried = dict(values)
    page_size, active = carried.get("page_size"), carried.get("max_num_active_seqs")
    page_ratio, room_ratio = _page_ratio(there, here), _room_ratio(there, here)
    if isinstance(page_size, int) and page_ratio is not None:
        sizes = sorted(int(choice) for choice in KNOBS_BY_NAME["page_size"].choices)
        wanted = page_size * page_ratio
        carried["page_size"] = min(sizes, key=lambda size: abs(math.log(size / wanted)))
    if isinstance(active, int) and room_ratio is not None:
        carried["max_num_active_seqs"] = max(1, round(active * room_ratio))
    return carried


def _rank(found: Found) -> tuple[int, bool, float, bool, float]:
    profile, level = found.profile, LEVELS.index(found.match.level)
    is_seed = profile.seed is not None
    return level, not profile.pinned, found.match.distance, is_seed, -profile.created_at


def _changed_keys(there: Site, here: Site) -> Iterator[str]:
    for name in ("hardware", "model", "dtype"):
        tuned, now = getattr(there.key, name), getattr(here.key, name)
        if tuned != now:
            yield f"{name}: tuned on {tuned}, this is {now}"


def _octaves(there: Site, here: Site) -> Iterator[float]:
    same_hardware = there.key.hardware == here.key.hardware
    same_model = there.key.model == here.key.model
    yield _octave(_parts(there.key)[2], _parts(here.key)[2], is_same=same_hardware)
    for name in ("copy_bytes_per_s", "link_bytes_per_s"):
        rates = [getattr(platform.rates, name, None) for platform in (there, here)]
        yield _octave(*rates, is_same=same_hardware)
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        sizes = [getattr(platform.shape, name, None) for platform in (there, here)]
        yield _octave(*sizes, is_same=same_model)
    numbers = [DTYPE_BYTES.get(platform.key.dtype) for platform in (there, here)]
    yield _octave(*numbers, is_same=there.key.dtype == here.key.dtype)


def _octave(one: float | None, other: float | None, *, is_same: bool) -> float:
    if is_same:
        return 0.0
    if one is None or other is None or min(one, other) <= 0:
        return UNKNOWN_OCTAVES
    return abs(math.log2(one) - math.log2(other))


def _parts(key: ProfileKey) -> tuple[str, str, int | None]:
    """Kind, name and GiB of the hardware; kind and name empty where the fingerprint is none."""
    found = FINGERPRINT.fullmatch(key.hardware)
    if found is None:
        return "", "", None
    return found["kind"], found["name"], int(found["gib"])


def _page_ratio(there: Site, here: Site) -> float | None:
    """Tokens of a page here over those of a page of as many bytes there."""
    bytes_of = [_token_bytes(platform) for platform in (there, here)]
    return bytes_of[0] / bytes_of[1] if bytes_of[0] and bytes_of[1] else None


def _token_bytes(platform: Site) -> int | None:
    """K and V of one token of one lane."""
    number_bytes = DTYPE_BYTES.get(platform.key.dtype)
    if platform.shape is None or number_bytes is None:
        return None
    return 2 * platform.shape.head_dim * number_bytes


def _room_ratio(there: Site, here: Site) -> float | None:
    rooms = [_room_tokens(platform) for platform in (there, here)]
    return rooms[1] / rooms[0] if rooms[0] and rooms[1] else None


def _room_tokens(platform: Site) -> float | None:
    """Tokens of KV that the memory has room for beside the weights; None: not known, or none."""
    shape, gib, dtype = platform.shape, _parts(platform.key)[2], platform.key.dtype
    if shape is None or not gib or dtype not in DTYPE_BYTES:
        return None
    free_bytes = gib * GIB - shape.weight_bytes(dtype)
    return free_bytes / shape.kv_bytes_per_token(dtype) if free_bytes > 0 else None
