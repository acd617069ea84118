"""Memory of the control group this process lives in, its limit and its ends; version 1 and version 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

UNLIMITED_BYTES = 1 << 60  # version 1 writes a number near 2**63 where there is no limit


class MemoryLimit(NamedTuple):
    """The tightest limit on the way up; ``free_bytes`` counts reclaimable file pages as free."""

    total_bytes: int
    free_bytes: int


class _Layout(NamedTuple):
    mount: str
    limit: str
    usage: str
    reclaimable: str  # key of memory.stat
    events: str  # the file that counts ends


_V1 = _Layout(
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
    "memory.oom_control",
)
_V2 = _Layout("", "memory.max", "memory.current", "inactive_file", "memory.events")
_V2_HYBRID = _V2._replace(mount="unified")


def read_memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """The limit that binds first among this group and its parents; None: there is no limit.

    Units: bytes. Errors: none; files that are missing or unreadable set no limit.
    """
    limits = [
        limit
        for layout, group in _groups(root)
        for folder in _upwards(root / "sys/fs/cgroup" / layout.mount, group)
        if (limit := _limit_of(folder, layout)) is not None
    ]
    if not limits:
        return None
    return MemoryLimit(
        min(limit.total_bytes for limit in limits), min(limit.free_bytes for limit in limits)
    )


def read_oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this group the kernel has ended for want of memory, whether the
    group's or the machine's ran out; None: this kernel, or this container, does not tell.

    Errors: none. Source: oom_kill in memory.events (version 2) or memory.oom_control (version 1)
    of the nearest group on the way up that counts.
    """
    for layout, group in _groups(root):
        for folder in _upwards(root / "sys/fs/cgroup" / layout.mount, group):
            count = _value_of(folder / layout.events, "oom_kill")
            if count is not None:
                return count
    return None


def _groups(root: Path) -> Iterator[tuple[_Layout, str]]:
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield _V1, group
        elif hierarchy == "0":
            yield _V2, group
            yield _V2_HYBRID, group


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    # In a container the path may be the host's and lead nowhere; the mount itself then counts.
    folder = mount / group.lstrip("/")
    yield folder
    while folder != mount and mount in folder.parents:
        folder = folder.parent
        yield folder


def _limit_of(folder: Path, layout: _Layout) -> MemoryLimit | None:
    limit = _read(folder / layout.limit)
    usage = _read(folder / layout.usage)
    if limit is None or usage is None or not limit.isdigit() or int(limit) >= UNLIMITED_BYTES:
        return None
    reclaimable_bytes = _value_of(folder / "memory.stat", layout.reclaimable) or 0
    used_bytes = int(usage) - reclaimable_bytes
    return MemoryLimit(int(limit), max(0, int(limit) - used_bytes))


def _value_of(file: Path, key: str) -> int | None:
    """Of a file with a key and a number on each line; None where either is missing."""
    for line in (_read(file) or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
