"""Run in an environment that holds the wheel and its declared dependencies, nothing else.

Finds what a development environment hides: a dependency nobody declared, a file that is not in
the wheel (migrations, stubs), a schema that is never made.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import tempfile
from pathlib import Path

import sparsed
from sparsed.controller.seeds import load_seeds
from sparsed.core import Objective, Profile, ProfileKey, ProfileStatus
from sparsed.db import open_store

KEY = ProfileKey(hardware="cpu:smoke:1:1GiB", model="smoke", dtype="float32")


def import_every_module() -> int:
    """Number of modules imported. Alembic alone runs the migration scripts."""
    names = [
        module.name
        for module in pkgutil.walk_packages(sparsed.__path__, prefix="sparsed.")
        if ".migrations." not in module.name
    ]
    for name in names:
        importlib.import_module(name)
    return len(names)


def keep_a_profile() -> None:
    saved = Profile(
        key=KEY,
        values={"token_budget": 1024},
        status=ProfileStatus.VERIFIED,
        workload="smoke",
        objective=Objective.THROUGHPUT,
        default_scores=(1.0,),
        winner_scores=(2.0,),
    )
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "sparsed.db")
        store.save_profile(saved)
        store.close()
        again = open_store(Path(folder) / "sparsed.db")
        found = again.find_verified(KEY)
        again.close()
    assert found is not None and found.values == saved.values, found


def read_what_ships(repository: Path) -> int:
    """Number of profiles in the wheel: all that the repository has, and each can be read."""
    shipped = {profile.seed: profile for profile in load_seeds()}
    expected = {file.stem: file for file in (repository / "db/seeds").glob("*.json")}
    assert shipped.keys() == expected.keys(), (sorted(map(str, shipped)), sorted(expected))
    for name, file in expected.items():
        assert json.loads(file.read_text())["values"] == shipped[name].values, name
    return len(shipped)


def main() -> None:
    repository = Path(__file__).resolve().parents[1]
    assert repository not in Path(sparsed.__file__).resolve().parents, sparsed.__file__
    num_modules = import_every_module()
    assert num_modules > 30, num_modules
    keep_a_profile()
    num_seeds = read_what_ships(repository)
    print(f"wheel: {num_modules} modules import, a profile is kept, {num_seeds} ship")


if __name__ == "__main__":
    main()
