"""A profile as a text: for a start, for an import, and for other engines as far as they go."""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Any, Final

import msgspec

from sparsed.core import InputError, KnobValue, Profile, ProfileKey, check_knob_values
from sparsed.tuner.engines import DeviceMemory, Engine, check_version, engine_settings, losses

CONFIG_VERSION: Final = 1
BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")  # of TOML
ENVIRONMENT_PREFIX: Final = "SPARSED_"  # of a start
MAX_COUNT: Final = 2**62  # of parameters and of all that a shape counts
# Sizes of a shape that others are divided by.
DIVISORS: Final = frozenset({"num_layers", "num_heads", "num_kv_heads", "head_dim"})
TUNED_FOR: Final = "tuned_for"  # the table of a TOML file that says where the values come from


class ExportFormat(StrEnum):
    TOML = "toml"  # a file for ``sparsed start --config``
    JSON = "json"
    VLLM = "vllm"  # flags
    VLLM_YAML = "vllm-yaml"  # a file for ``vllm serve --config``
    SGLANG = "sglang"  # flags
    TRTLLM = "trtllm"  # a file for ``trtllm-serve --config``
    ENV = "env"  # variables for ``sparsed start``
    CLI = "cli"  # its command line
    MARKDOWN = "markdown"  # to read


FORMAT_BY_SUFFIX: Final[Mapping[str, ExportFormat]] = {
    ".toml": ExportFormat.TOML,
    ".json": ExportFormat.JSON,
    ".yaml": ExportFormat.VLLM_YAML,
    ".yml": ExportFormat.VLLM_YAML,
    ".env": ExportFormat.ENV,
    ".sh": ExportFormat.CLI,
    ".md": ExportFormat.MARKDOWN,
}
ENGINE_OF: Final[Mapping[ExportFormat, Engine]] = {
    ExportFormat.VLLM: Engine.VLLM,
    ExportFormat.VLLM_YAML: Engine.VLLM,
    ExportFormat.SGLANG: Engine.SGLANG,
    ExportFormat.TRTLLM: Engine.TRTLLM,
}
COMMANDS: Final[Mapping[Engine, str]] = {
    Engine.VLLM: "vllm serve {model}",
    Engine.SGLANG: "python -m sglang.launch_server --model-path {model}",
}


def render_profile(
    profile: Profile,
    *,
    format: str,
    memory: DeviceMemory | None = None,
    engine_version: str | None = None,
    force: bool = False,
) -> str:
    """The text of ``profile`` in one of ``ExportFormat``, ending in a newline.

    ``memory`` lets the settings of other engines bound the memory. ``engine_version`` is the one
    they are for, None the newest known. InputError: unknown format, a version for a format of
    ours, or without ``force`` one whose names were not checked.
    """
    if format not in set(ExportFormat):
        known = ", ".join(ExportFormat)
        raise InputError(f"format {format!r} is not one of {known}", field="format")
    chosen = ExportFormat(format)
    if chosen in ENGINE_OF:
        return _engine(profile, chosen, memory=memory, version=engine_version, force=force)
    if engine_version is not None:
        raise InputError(
            f"format {chosen} is for no other engine: leave the engine version out",
            field="engine_version",
        )
    writers: Mapping[ExportFormat, Callable[[Profile], str]] = {
        ExportFormat.TOML: _toml,
        ExportFormat.JSON: _json,
        ExportFormat.ENV: _env,
        ExportFormat.CLI: _cli,
        ExportFormat.MARKDOWN: _markdown,
    }
    return writers[chosen](profile)


def parse_profile(text: str) -> Profile:
    """The profile in a JSON or TOML text of ``render_profile``, without id and pin, which belong
    to the database it came from. InputError says what is wrong."""
    try:
        is_json = text.lstrip().startswith("{")
        content = json.loads(text) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"the text is neither JSON nor TOML: {error}"
        raise InputError(message, field="profile") from error
    version = content.pop("config_version", None)
    if version != CONFIG_VERSION:
        raise InputError(
            f"config_version is {version!r}; this version reads {CONFIG_VERSION}",
            field="config_version",
        )
    if is_json:
        profile = _convert(content)
    else:
        profile = replace(read_tuned_for(content.pop(TUNED_FOR, None)), values=content)
    _check_numbers(profile)
    values = check_knob_values(profile.values)
    return replace(profile, values=values, profile_id=None, pinned=False, seed=None)


def read_tuned_for(table: object) -> Profile:
    """The profile, without its values, in the table ``TUNED_FOR`` of a TOML file. InputError."""
    if not isinstance(table, dict):
        raise InputError(
            f"the text has no table [{TUNED_FOR}]; give a file that was exported as a profile",
            field=TUNED_FOR,
        )
    key_names = ("hardware", "model", "dtype")
    key = {name: table[name] for name in key_names if name in table}
    others = {name: value for name, value in table.items() if name not in key_names}
    return _convert({**others, "key": key, "values": {}})


def mismatch(
    profile: Profile, key: ProfileKey, *, versions: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """What of this machine, model and software is not what ``profile`` was tuned for."""
    pairs = [
        ("hardware", profile.key.hardware, key.hardware),
        ("model", profile.key.model, key.model),
        ("dtype", profile.key.dtype, key.dtype),
        *(
            (name, profile.versions[name], version)
            for name, version in sorted((versions or {}).items())
            if name in profile.versions
        ),
    ]
    return tuple(
        f"{name}: tuned on {tuned}, this is {here}" for name, tuned, here in pairs if tuned != here
    )


# --------------------------------------------------------------------------------------------
# Our own formats
# --------------------------------------------------------------------------------------------


def _json(profile: Profile) -> str:
    return json.dumps({"config_version": CONFIG_VERSION} | _content(profile), indent=2) + "\n"


def _content(profile: Profile) -> dict[str, Any]:
    content = asdict(profile)
    del content["profile_id"], content["pinned"], content["seed"]
    if profile.shape is None:
        del content["shape"]
    return content


def _toml(profile: Profile) -> str:
    content = _content(profile)
    values, versions = content.pop("values"), content.pop("versions")
    shape = content.pop("shape", None)
    tuned_for = content.pop("key") | content
    return "\n".join(
        (
            *_header(profile),
            f"config_version = {CONFIG_VERSION}",
            *_toml_lines({name: "auto" if v is None else v for name, v in values.items()}),
            "",
            "# Where the values come from; a start elsewhere says what differs.",
            f"[{TUNED_FOR}]",
            *_toml_lines(tuned_for),
            f"[{TUNED_FOR}.versions]",
            *_toml_lines(versions),
            *([f"[{TUNED_FOR}.shape]", *_toml_lines(shape)] if shape else []),
            "",
        )
    )


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{name if BARE_KEY.fullmatch(name) else _quoted(name)} = {_quoted(value)}"
        for name, value in values.items()
    ]


def _quoted(value: object) -> str:
    """A scalar or a flat list as JSON that is TOML and YAML as well: no surrogate pairs, and the
    one control character that JSON leaves alone is escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_numbers(profile: Profile) -> None:
    """InputError for numbers that nothing could be worked out from later: every start compares the
    profiles that are stored, and one of them must not stop it."""
    scores = (*profile.default_scores, *profile.winner_scores)
    if not all(map(math.isfinite, (*scores, profile.created_at, profile.gain_frac or 0.0))):
        raise InputError("not a profile: its scores or its time are not finite", field="profile")
    for name, count in asdict(profile.shape).items() if profile.shape else ():
        if not 0 <= count <= MAX_COUNT or (name in DIVISORS and not count):
            raise InputError(f"not a profile: shape.{name} is {count}", field="profile")


def _convert(content: object) -> Profile:
    try:
        return msgspec.convert(content, Profile, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"not a profile: {error}", field="profile") from error


# --------------------------------------------------------------------------------------------
# Shells, readers and other engines
# --------------------------------------------------------------------------------------------


def _env(profile: Profile) -> str:
    """Lines of a file for ``EnvironmentFile=`` or ``set -a; . FILE``: of plain words and numbers,
    so that both read them alike."""
    lines = (f"{ENVIRONMENT_PREFIX}{name.upper()}={text}" for name, text in _words(profile))
    return "\n".join((*_header(profile), *lines, ""))


def _cli(profile: Profile) -> str:
    words = [f"--{name.replace('_', '-')} {text}" for name, text in _words(profile)]
    return "\n".join((*_header(profile), "sparsed start " + " \\\n  ".join(words), ""))


def _words(profile: Profile) -> list[tuple[str, str]]:
    """What a start has to be told, as words of a shell."""
    told = {"model": profile.key.model, "dtype": profile.key.dtype, **profile.values}
    return [(n, shlex.quote("auto" if v is None else str(v))) for n, v in told.items()]


def _markdown(profile: Profile) -> str:
    title, origin = (line.removeprefix("# ") for line in _header(profile))
    rows = [f"| {name} | {_cell(value)} |" for name, value in profile.values.items()]
    versions = [f"| {_cell(name)} | {_cell(item)} |" for name, item in profile.versions.items()]
    scores = [
        f"| {name} | {', '.join(f'{score:.4g}' for score in found) or 'none'} |"
        for name, found in (("default", profile.default_scores), ("winner", profile.winner_scores))
    ]
    return "\n".join(
        (
            *(f"# {_cell(title)}", "", _cell(origin), ""),
            *("| knob | value |", "|--|--|", *rows, ""),
            *("| scores of the test | |", "|--|--|", *scores, ""),
            *("| software | version |", "|--|--|", *versions),
            "",
        )
    )


def _cell(value: object) -> str:
    text = "auto" if value is None else str(value)
    return "".join(c if c.isprintable() else "?" for c in text).replace("|", "\\|")


def _engine(
    profile: Profile,
    format: ExportFormat,
    *,
    memory: DeviceMemory | None,
    version: str | None,
    force: bool,
) -> str:
    """The settings of another engine, with what is lost and for which versions they hold."""
    engine = ENGINE_OF[format]
    gate = check_version(engine, version, force=force)
    settings = engine_settings(engine, profile, memory=memory)
    notes = (f"# {gate}", *losses(engine, profile, settings))
    model = profile.key.model
    if format is ExportFormat.VLLM_YAML:
        body = [f"{name}: {_quoted(value)}" for name, value in {"model": model, **settings}.items()]
    elif format is ExportFormat.TRTLLM:
        body = _nested(settings)
    else:
        words = [COMMANDS[engine].format(model=shlex.quote(model))]
        words += [f"--{name} {value}" for name, value in settings.items()]
        body = [" \\\n  ".join(words)]
    return "\n".join((*_header(profile), *notes, *body, ""))


def _nested(settings: Mapping[str, KnobValue]) -> list[str]:
    """YAML of names with at most one dot, which opens a table; tables come last."""
    flat = [f"{name}: {_quoted(value)}" for name, value in settings.items() if "." not in name]
    tables: dict[str, list[str]] = {}
    for name, value in settings.items():
        table, dot, field = name.partition(".")
        if dot:
            tables.setdefault(table, []).append(f"  {field}: {_quoted(value)}")
    return flat + [line for name, lines in tables.items() for line in (f"{name}:", *lines)]


def _header(profile: Profile) -> tuple[str, ...]:
    number = "" if profile.profile_id is None else f" {profile.profile_id}"
    gain = "no gain proved" if profile.gain_frac is None else f"{profile.gain_frac:+.1%}"
    evidence = f"{profile.objective} on {profile.workload}: {gain} over the default"
    key = profile.key
    lines = (
        f"# sparsed profile{number} ({profile.status}), {evidence}",
        f"# tuned on {key.hardware} for {key.model}, {key.dtype}",
    )
    # A name with a line break in it must not end the comment.
    return tuple("".join(c if c.isprintable() else "?" for c in line) for line in lines)
