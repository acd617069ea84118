"""Measures a profile that ships with the package, on a GPU that does nothing else.

Run from the root: ``PYTHONPATH=src:benchmarks python benchmarks/seed_profiles.py --name llama-3.1-8b-h100``. Tunes
a model of known shape with random weights (``sparsed tune``, in a state directory of its own, without any
other profile) and writes the verified winner to ``db/seeds/NAME.json``, from where live tuners and searches
of this GPU take it; prints the file. Weights say nothing of quality, so what recall depends on is fixed at its
default and no floor of recall holds: what is searched changes speed alone. A small DRAM tier
(``-- --kv-dram-gib 16``) makes the start shorter, which the search's time includes. Exits with 1, and writes
nothing, where the default stays. About seven minutes with the default options.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from report import environment

from sparsed.core import KNOBS_BY_NAME, RECALL_KNOBS, Profile, ProfileStatus
from sparsed.engine.planner import PAGE_TOKENS
from sparsed.tuner.export import ExportFormat, parse_profile, render_profile

ROOT: Final = Path(__file__).resolve().parents[1]
SEEDS: Final = ROOT / "db" / "seeds"


def tune_command(options: argparse.Namespace, *, state_dir: Path, export: Path) -> list[str]:
    known = {name: KNOBS_BY_NAME[name].default for name in sorted(RECALL_KNOBS)}
    known["page_size"] = PAGE_TOKENS
    fixed = ((f"--{name.replace('_', '-')}", value) for name, value in known.items())
    return [
        sys.executable, "-m", "sparsed", "tune", options.model, "--device", options.device,
        "--state-dir", str(state_dir), "--workload", options.workload,
        "--trials", str(options.trials), "--trial-seconds", str(options.trial_seconds),
        "--max-seconds", str(options.max_seconds), "--export", str(export), "--min-recall", "0",
        *(str(word) for pair in fixed for word in pair), *options.more,
    ]  # fmt: skip


def keep(profile: Profile, *, name: str, folder: Path) -> Path:
    """Write ``profile`` as the seed ``name``. SystemExit if it is not verified."""
    if profile.status is not ProfileStatus.VERIFIED:
        raise SystemExit("the default stays: there is nothing to ship")
    file = folder / f"{name}.json"
    folder.mkdir(exist_ok=True)
    file.write_text(render_profile(profile, format=ExportFormat.JSON), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="of the file, and as users will see it")
    parser.add_argument("--model", default="dummy:llama-3.1-8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workload", default="mixed")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--trial-seconds", type=float, default=4.0)
    parser.add_argument("--max-seconds", type=float, default=420.0)
    parser.add_argument("--folder", type=Path, default=SEEDS)
    parser.add_argument("more", nargs="*", help="further flags of sparsed tune, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        export = Path(directory) / "profile.json"
        command = tune_command(options, state_dir=Path(directory) / "state", export=export)
        code = subprocess.run(command, check=False).returncode
        if code or not export.exists():
            raise SystemExit(f"sparsed tune ended with {code} and no profile")
        profile = parse_profile(export.read_text(encoding="utf-8"))
    file = keep(profile, name=options.name, folder=options.folder)
    print(f"measured on {environment()['device']}, commit {environment()['commit']}")
    print(f"{file}:\n{file.read_text(encoding='utf-8')}", end="")


if __name__ == "__main__":
    main()
