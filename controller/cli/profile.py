"""``sparsed profile list|show|export|import|pin``: through the daemon, or without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from sparsed.tuner.export import FORMAT_BY_SUFFIX, ExportFormat

if TYPE_CHECKING:
    from sparsed.controller.state_dir import StateDir
    from sparsed.core import Profile

app = typer.Typer(
    help="Tuned configurations, kept per hardware, model and dtype. Works without a daemon too.",
    no_args_is_help=True,
)

IdArgument = Annotated[int, typer.Argument(metavar="ID", help="As in: profile list.")]


@app.command("list")
def list_(state_dir: StateDirOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show all profiles, newest first."""
    with _shelf(state_dir) as shelf:
        profiles = shelf.list_profiles()
    if output is Output.JSON:
        print_json(list(profiles))
        return
    if not profiles:
        print("no profiles")
        return
    print_table(
        ("id", "status", "pinned", "gain", "model", "dtype", "workload", "hardware"),
        (
            (
                profile.profile_id,
                profile.status.value,
                "yes" if profile.pinned else "",
                _gain(profile),
                profile.key.model,
                profile.key.dtype,
                profile.workload,
                profile.key.hardware,
            )
            for profile in profiles
        ),
    )


@app.command()
def show(
    profile_id: IdArgument, state_dir: StateDirOption = None, output: OutputOption = Output.TEXT
) -> None:
    """Show one profile: values, evidence, versions."""
    with _shelf(state_dir) as shelf:
        profile = shelf.get_profile(profile_id)
    if output is Output.JSON:
        print_json(profile)
        return
    print_table(("profile", ""), _lines(profile))


@app.command()
def export(
    profile_id: IdArgument,
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
    with _shelf(state_dir) as shelf:
        text = shelf.export_profile(
            profile_id, format=format or by_suffix, engine_version=engine_version, force=force
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
    """Prefer a profile to all others of its hardware, model and dtype at the next start."""
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


def _lines(profile: Profile) -> Iterator[tuple[str, object]]:
    yield "id", profile.profile_id
    yield "status", profile.status.value + (", pinned" if profile.pinned else "")
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
