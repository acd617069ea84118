"""What an operator asked for, from flags, environment and a TOML file, checked and frozen."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsed.controller.control import KnobSource
from sparsed.controller.options import (
    ENVIRONMENT_PREFIX,
    OPTIONS,
    Given,
    parse_knob,
    parse_path,
)
from sparsed.controller.state_dir import StateDir, resolve_cache_dir, resolve_state_dir
from sparsed.core import (
    KNOBS_BY_NAME,
    ExitCode,
    InputError,
    KnobValue,
    Profile,
    Slo,
    VerifyMode,
)
from sparsed.profiler.context import HORIZON_S
from sparsed.tuner.export import TUNED_FOR, read_tuned_for

CONFIG_VERSION = 1
TEST_PREFIX = "SPARSED_TEST_"  # variables of the test suite, inherited by the daemons it starts
BUILTIN_MODEL = "smollm2-135m"
IN_SECONDS = {"shutdown_timeout": "drain_timeout_s", "regime_dwell": "regime_dwell_s"}
SLO_NAMES = {"ttft_s": "slo_ttft_ms", "tpot_s": "slo_tpot_ms", "min_recall": "min_recall"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonConfig:
    """Everything `sparsed start` was told; knobs that were not given are not in ``knobs``.

    ``origins`` names the source of each value that was given (options and knobs alike).
    """

    state_dir: StateDir
    cache_dir: Path
    model: str = BUILTIN_MODEL
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto or a key of DTYPE_BYTES
    slo: Slo = field(default_factory=Slo)
    drain_timeout_s: float = 30.0
    max_queued_requests: int = 1024  # beyond those that run
    regime_dwell_s: float = 600.0  # of a load, before it is another regime
    recall_floor: float = 0.5  # of attention recall, see ``Service``; 0: off
    seed: int = 0
    no_profile: bool = False
    enforce_eager: bool = False
    always_select: bool = False
    verify_kv: str = VerifyMode.OFF.value
    selection_trace: Path | None = None  # a recording whose selections replace the model's own
    tensor_parallel_size: int = 1
    knobs: Mapping[str, KnobValue] = field(default_factory=dict)
    origins: Mapping[str, KnobSource] = field(default_factory=dict)
    tuned_for: Profile | None = None  # where the file's values come from, if it says so

    @property
    def context_horizon_s(self) -> float:
        """What the context of the load covers: a minute, less where regimes come faster."""
        return min(HORIZON_S, self.regime_dwell_s / 4)

    def origin(self, name: str) -> KnobSource:
        return self.origins.get(name, KnobSource.DEFAULT)

    @property
    def url(self) -> str:
        """Where HTTP is served."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def load_config(
    *,
    flags: Mapping[str, object],
    environment: Mapping[str, str],
    file: Path | None = None,
) -> DaemonConfig:
    """Merge the sources and check them: a flag over SPARSED_* over what a daemon of the same state
    directory was told to use from its next start on, over the file, over the default.

    ``flags``: by flag name with underscores (``OPTIONS`` and knob names); None: not given.
    Errors: InputError naming the field, where it was given, and what is allowed.
    """
    from_file, tuned_for = _from_file(file) if file is not None else ({}, None)
    told = _from_environment(environment) | _from_flags(flags)
    place = (from_file | told).get("state_dir")
    explicit = parse_path(place) if place else None
    state_dir = resolve_state_dir(explicit, environment=environment)
    pending = state_dir.pending_file
    waiting = _from_file(pending, source=KnobSource.LIVE)[0] if pending.exists() else {}
    given = from_file | waiting | told
    for name, item in from_file.items():
        _parse(name, item)  # also what is overridden now: it would strike at another start
    values = {name: _parse(name, item) for name, item in given.items()}
    options = {name: value for name, value in values.items() if name in OPTIONS}
    options.pop("state_dir", None)
    slo = {field: options.pop(name, None) for field, name in SLO_NAMES.items()}
    for name, field_name in IN_SECONDS.items():
        if name in options:
            options[field_name] = options.pop(name)
    return DaemonConfig(
        state_dir=state_dir,
        cache_dir=resolve_cache_dir(environment),
        slo=Slo(**slo),
        knobs={name: value for name, value in values.items() if name not in OPTIONS},
        origins={name: item.source for name, item in given.items()},
        tuned_for=tuned_for,
        **options,
    )


def _parse(name: str, given: Given) -> Any:
    """The value, of the type that its parser makes; a wrong one from a file is an error of
    configuration."""
    try:
        return OPTIONS[name](given) if name in OPTIONS else parse_knob(name, given)
    except InputError as error:
        from_file = given.source in (KnobSource.FILE, KnobSource.LIVE)
        code = ExitCode.CONFIG if from_file else ExitCode.USAGE
        raise InputError(str(error), field=error.field, code=code) from None


def _from_flags(flags: Mapping[str, object]) -> dict[str, Given]:
    named = {name: value for name, value in flags.items() if value is not None}
    return {
        name: Given(value=value, source=KnobSource.FLAG, where=f"--{name.replace('_', '-')}")
        for name, value in named.items()
        if _known(name, where=f"--{name.replace('_', '-')}")
    }


def _from_environment(environment: Mapping[str, str]) -> dict[str, Given]:
    given = {}
    for variable, value in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX) and not variable.startswith(TEST_PREFIX):
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            _known(name, where=f"environment variable {variable}")
            given[name] = Given(value=value, source=KnobSource.ENVIRONMENT, where=variable)
    return given


def write_pending(file: Path, values: Mapping[str, KnobValue]) -> None:
    """Keep ``values`` for the next ``load_config``; none: drop the file. InputError if it cannot."""
    try:
        _write_pending(file, values)
    except OSError as error:
        message = f"cannot write {file}: {error.strerror}; knobs of a restart are not kept"
        raise InputError(message) from error


def _write_pending(file: Path, values: Mapping[str, KnobValue]) -> None:
    if not values:
        file.unlink(missing_ok=True)
        return
    lines = [
        f"{name} = {json.dumps('auto' if value is None else value)}"
        for name, value in values.items()
    ]
    draft = file.with_suffix(".tmp")
    draft.write_text(
        "\n".join((f"config_version = {CONFIG_VERSION}", *lines, "")), encoding="utf-8"
    )
    draft.replace(file)


def _from_file(
    file: Path, *, source: KnobSource = KnobSource.FILE
) -> tuple[dict[str, Given], Profile | None]:
    """The values, and the profile the file is an export of, if it is one."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror}", field="config", code=ExitCode.CONFIG
        ) from error
    except ValueError as error:  # also bytes that are not UTF-8
        raise InputError(
            f"{file} is not valid TOML: {error}", field="config", code=ExitCode.CONFIG
        ) from error
    version = content.pop("config_version", None)
    if version != CONFIG_VERSION:
        raise InputError(
            f"{file}: config_version is {version or 'missing'}; this version reads files with the "
            f"line `config_version = {CONFIG_VERSION}`",
            field="config_version",
            code=ExitCode.CONFIG,
        )
    tuned_for = read_tuned_for(content.pop(TUNED_FOR)) if TUNED_FOR in content else None
    given = {
        name: Given(value=value, source=source, where=f"{name} in {file}")
        for name, value in content.items()
        if _known(name, where=f"key {name!r} in {file}")
    }
    return given, tuned_for


def _known(name: str, *, where: str) -> bool:
    if name in OPTIONS or name in KNOBS_BY_NAME:
        return True
    near = difflib.get_close_matches(name, [*OPTIONS, *KNOBS_BY_NAME], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; see: sparsed start --help"
    code = ExitCode.CONFIG if where.startswith("key ") else ExitCode.USAGE
    raise InputError(f"unknown {where}{hint}", field=name, code=code)
