"""Profiles that ship with the package: ``db/seeds/NAME.json``, as ``sparsed profile export`` writes them."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from sparsed.core import InputError, Profile
from sparsed.tuner.export import parse_profile

SEEDS: Final = files("sparsed.db") / "seeds"
SUFFIX: Final = ".json"


def load_seeds(folder: Traversable = SEEDS) -> tuple[Profile, ...]:
    """Each with the name of its file as ``seed``, in the order of their names.

    Errors: InputError naming the file that holds no profile.
    """
    if not folder.is_dir():
        return ()
    found = (item for item in folder.iterdir() if item.name.endswith(SUFFIX))
    return tuple(_load(item) for item in sorted(found, key=lambda item: item.name))


def find_seed(name: str) -> Profile | None:
    """The profile of this name that ships with the package."""
    return next((profile for profile in load_seeds() if profile.seed == name), None)


def _load(file: Traversable) -> Profile:
    try:
        profile = parse_profile(file.read_text(encoding="utf-8"))
    except (InputError, UnicodeDecodeError) as error:
        message = f"{file.name} of the package holds no profile ({error}); install sparsed anew"
        raise InputError(message, field="profile") from error
    return replace(profile, seed=file.name.removesuffix(SUFFIX))
