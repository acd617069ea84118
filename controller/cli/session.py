"""One verb's conversation with the daemon: which socket, and which exit status on failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsed.controller.cli.output import complain
from sparsed.controller.state_dir import StateDir, resolve_state_dir

if TYPE_CHECKING:
    from sparsed.controller.client import AdminClient

ERROR = 1
NOT_RUNNING = 3
DEGRADED = 4
RESTART_PENDING = 5

StateDirOption = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        help="State directory of the daemon. Default: $STATE_DIRECTORY, "
        "else $XDG_STATE_HOME/sparsed, else ~/.local/state/sparsed.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything, change nothing.")]
ReasonOption = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why, for the daemon's log.")
]


def find_state_dir(explicit: Path | None) -> StateDir:
    return resolve_state_dir(explicit, environment=os.environ)


@contextmanager
def connect(state_dir: Path | None, *, write: bool = False) -> Iterator[AdminClient]:
    """A client on the read socket, or on the admin socket to ``write``.

    Ends the process with NOT_RUNNING or ERROR when the daemon cannot be asked or refuses.
    """
    from sparsed.controller.client import AdminClient, CallFailed, DaemonUnreachable

    place = find_state_dir(state_dir)
    try:
        with AdminClient(place.admin_socket if write else place.read_socket) as client:
            yield client
    except DaemonUnreachable as error:
        complain(str(error))
        raise typer.Exit(NOT_RUNNING) from None
    except CallFailed as error:
        complain(str(error))
        raise typer.Exit(ERROR) from None
