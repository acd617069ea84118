"""``sparsed profile list|show|export|import|pin``: through the daemon, or without one.

What ships with the package is read from the package, and needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed.controller.cli.output import (
    Output,
    OutputOption,
    complain,
    print_json,
    print_table,
)
from sparsed.controller.cli.session import (
    ERROR,
    DryRunOption,
    ReasonOption,
    StateDirOption,
    find_state_dir,
)
from sparsed.controller.profiles import ProfileShelf, StoredProfiles
from sparsed.controller.seeds import find_seed, load_seeds
from sparsed.core import InputError
from sparsed.tuner.export import FORMAT_BY_SUFFIX, ExportFormat, render_profile

if TYPE_CHECKING:
    from sparsed.controller.state_dir import StateDir
    from sparsed.core import Profile, ProfileMatch

app = typer.Typer(
    help="Tuned configurations, kept per hardware, model and dtype. Works without a daemon too.",
    no_args_is_help=True,
)

IdArgument = Annotated[int, typer.Argument(metavar="ID", help="As in: profile list.")]
IdOrNameArgument = Annotated[
    str,
    typer.Argument(metavar="ID|NAME", help="As in: profile list; a name is of one that ships."),
]


@app.command("list")
def list_(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show all profiles, newest first, then those that ship with sparsed, and how far each is good
    on this machine for its own model and dtype: exact (a start uses it), compatible (a start leaves
    it out unless it is pinned; the tuner tests it first), transfer (sparsed tune begins from it),
    none."""
    from sparsed.controller.profile_match import match_here
    from sparsed.profiler.machine import read_machine

    with _shelf(state_dir) as shelf:
        profiles = (*shelf.list_profiles(), *load_seeds())
    machine = read_machine()
    matches = [match_here(profile, machine) for profile in profiles]
    if output is Output.JSON:
        pairs = zip(profiles, matches, strict=True)
        print_json([asdict(profile) | {"match": match} for profile, match in pairs])
        return
    if not profiles:
        print("no profiles")
        return
    print_table(
        ("id", "status", "pinned", "here", "gain", "model", "dtype", "workload", "hardware"),
        (
            (
                profile.seed or profile.profile_id,
                "shipped" if profile.seed else profile.status.value,
                "yes" if profile.pinned else "",
                match.level.value,
                _gain(profile),
                profile.key.model,
                profile.key.dtype,
                profile.workload,
                profile.key.hardware,
            )
            for profile, match in zip(profiles, matches, strict=True)
        ),
    )


@app.command()
def show(
    profile_id: IdOrNameArgument,
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show one profile: values, evidence, versions, and how far it is good on this machine."""
    from sparsed.controller.profile_match import match_here
    from sparsed.profiler.machine import read_machine

    profile = find_seed(profile_id)
    if profile is None:
        with _shelf(state_dir) as shelf:
            profile = shelf.get_profile(_number(profile_id))
    match = match_here(profile, read_machine())
    if output is Output.JSON:
        print_json(asdict(profile) | {"match": match})
        return
    print_table(("profile", ""), _lines(profile, match))


@app.command()
def export(
    profile_id: IdOrNameArgument,
    format: Annotated[
        ExportFormat | None,
        typer.Option(
            "--format",
            help="toml: for start --config; json: complete; env, cli: for start; vllm, sglang: "
            "flags; vllm-yaml, trtllm: their configuration files; markdown: to read. Default: by "
            "the suffix of FILE, else toml.",
        ),
    ] = None,
    engine_version: Annotated[
        str | None,
        typer.Option(
            "--engine-version",
            metavar="VERSION",
            help="Of the other engine; one whose names were not compared is refused. Default: one "
            "of those that were, and the text says which.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Export for an --engine-version that was not compared."),
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: standard output."),
    ] = None,
    state_dir: StateDirOption = None,
) -> None:
    """Write one profile in the format of another program or start."""
    by_suffix = FORMAT_BY_SUFFIX.get(file.suffix if file else "", ExportFormat.TOML)
    chosen = format or by_suffix
    if (seed := find_seed(profile_id)) is not None:
        text = render_profile(seed, format=chosen, engine_version=engine_version, force=force)
    else:
        with _shelf(state_dir) as shelf:
            text = shelf.export_profile(
                _number(profile_id), format=chosen, engine_version=engine_version, force=force
            )
    if file is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        _write(file, text)


@app.command("import")
def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="TOML or JSON, as export writes it.")
    ],
    dry_run: DryRunOption = False,
    reason: ReasonOption = "",
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Store a profile that was exported, here or on another machine."""
    text = _read(file)
    with _shelf(state_dir, write=True) as shelf:
        profile = shelf.import_profile(text, validate_only=dry_run, reason=reason)
    _report(profile, "is valid" if dry_run else "is stored", output)


@app.command()
def pin(
    profile_id: IdArgument,
    dry_run: DryRunOption = False,
    reason: ReasonOption = "",
    state_dir: StateDirOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Prefer a profile to all others of its hardware, model and dtype at the next start. One that
    ships with sparsed is to be exported and imported first."""
    with _shelf(state_dir, write=True) as shelf:
        profile = shelf.pin_profile(profile_id, validate_only=dry_run, reason=reason)
    _report(profile, "can be pinned" if dry_run else "is pinned", output)


@contextmanager
def _shelf(state_dir: Path | None, *, write: bool = False) -> Iterator[ProfileShelf]:
    """The daemon's profiles if one runs, else the database itself; stderr says which."""
    from sparsed.controller.client import AdminClient, CallFailed, DaemonUnreachable

    place = find_state_dir(state_dir)
    try:
        with AdminClient(place.admin_socket if write else place.read_socket) as client:
            client.status()
            yield client
            return
    except CallFailed as error:
        complain(str(error))
        raise typer.Exit(ERROR) from None
    except DaemonUnreachable:
        pass
    with _database(place) as shelf:
        yield shelf


@contextmanager
def _database(place: StateDir) -> Iterator[ProfileShelf]:
    from sparsed.db import open_store
    from sparsed.db.store import StoreError

    complain(f"no daemon runs; using the database {place.database}")
    place.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    store = open_store(place.database)
    try:
        yield StoredProfiles(store)
    except StoreError as error:
        complain(str(error))
        raise typer.Exit(ERROR) from None
    finally:
        store.close()


def _gain(profile: Profile) -> str:
    return "-" if profile.gain_frac is None else f"{100 * profile.gain_frac:+.1f} %"


def _number(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise InputError(
        f"{text} is neither a number nor a profile that ships with sparsed; see: sparsed profile "
        "list",
        field="profile_id",
    )


def _lines(profile: Profile, match: ProfileMatch) -> Iterator[tuple[str, object]]:
    yield "id", profile.seed or profile.profile_id
    extras = [", pinned"] * profile.pinned + [", shipped"] * (profile.seed is not None)
    yield "status", profile.status.value + "".join(extras)
    yield "here", f"{match.level.value}: {match.why}"
    yield "hardware", profile.key.hardware
    yield "model", f"{profile.key.model}, {profile.key.dtype}"
    yield "workload", f"{profile.workload}, for {profile.objective.value}"
    yield "gain", _gain(profile)
    yield "default", " ".join(f"{score:.4g}" for score in profile.default_scores)
    yield "winner", " ".join(f"{score:.4g}" for score in profile.winner_scores)
    yield from profile.values.items()
    yield from ((f"{name} version", version) for name, version in profile.versions.items())


def _report(profile: Profile, what: str, output: Output) -> None:
    if output is Output.JSON:
        print_json(profile)
    else:
        number = "" if profile.profile_id is None else f" {profile.profile_id}"
        print(f"profile{number} for {profile.key.model} on {profile.key.hardware} {what}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        complain(f"cannot read {file}: {error}")
        raise typer.Exit(ERROR) from None


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        complain(f"cannot write {file}: {error.strerror}")
        raise typer.Exit(ERROR) from None
