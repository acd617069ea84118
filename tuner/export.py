"""A profile as a text: for a start, for an import, and for other engines as far as they go."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final

import msgspec

from sparsed.core import InputError, KnobValue, Profile, ProfileKey, check_knob_values

CONFIG_VERSION: Final = 1
BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")  # of TOML
VLLM_BLOCK_SIZES: Final = (16, 32)
TUNED_FOR: Final = "tuned_for"  # the table of a TOML file that says where the values come from


class ExportFormat(StrEnum):
    TOML = "toml"  # a file for ``sparsed start --config``
    JSON = "json"
    VLLM = "vllm"  # flags
    VLLM_YAML = "vllm-yaml"  # a file for ``vllm serve --config``
    SGLANG = "sglang"  # flags


FORMAT_BY_SUFFIX: Final[Mapping[str, ExportFormat]] = {
    ".toml": ExportFormat.TOML,
    ".json": ExportFormat.JSON,
    ".yaml": ExportFormat.VLLM_YAML,
    ".yml": ExportFormat.VLLM_YAML,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Bytes of one GPU. A fraction is never copied between engines, as each takes it of another
    whole; it is made from these."""

    device_bytes: int
    weights_bytes: int
    workspace_bytes: int
    kv_bytes: int

    @property
    def vllm_frac(self) -> float:
        """All use of the device, over the device."""
        used_bytes = self.weights_bytes + self.workspace_bytes + self.kv_bytes
        return used_bytes / self.device_bytes

    @property
    def sglang_frac(self) -> float:
        """Weights and KV, over the device."""
        return (self.weights_bytes + self.kv_bytes) / self.device_bytes


def render_profile(profile: Profile, *, format: str, memory: DeviceMemory | None = None) -> str:
    """The text of ``profile`` in one of ``ExportFormat``, ending in a newline.

    ``memory`` lets the flags of other engines bound the memory. InputError: unknown format.
    """
    if format not in set(ExportFormat):
        known = ", ".join(ExportFormat)
        raise InputError(f"format {format!r} is not one of {known}", field="format")
    writers: Mapping[ExportFormat, Callable[[], str]] = {
        ExportFormat.TOML: lambda: _toml(profile),
        ExportFormat.JSON: lambda: _json(profile),
        ExportFormat.VLLM: lambda: _flags(
            "vllm serve {model}", vllm_flags(profile, memory=memory), profile
        ),
        ExportFormat.VLLM_YAML: lambda: _yaml(profile, vllm_flags(profile, memory=memory)),
        ExportFormat.SGLANG: lambda: _flags(
            "python -m sglang.launch_server --model-path {model}",
            sglang_flags(profile, memory=memory),
            profile,
        ),
    }
    return writers[ExportFormat(format)]()


def parse_profile(text: str) -> Profile:
    """The profile in a JSON or TOML text of ``render_profile``, without id and pin, which belong
    to the database it came from. InputError says what is wrong."""
    try:
        is_json = text.lstrip().startswith("{")
        content = json.loads(text) if is_json else tomllib.loads(text)
    except ValueError as error:
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


def _convert(content: object) -> Profile:
    try:
        return msgspec.convert(content, Profile, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"not a profile: {error}", field="profile") from error


# --------------------------------------------------------------------------------------------
# Other engines
# --------------------------------------------------------------------------------------------


def vllm_flags(profile: Profile, *, memory: DeviceMemory | None) -> dict[str, KnobValue]:
    """vLLM's names. Its token limit of a step counts decode tokens too, ours does not. Its
    FlashAttention takes blocks of multiples of 16 tokens, its older versions none above 32 on
    CUDA: other page sizes are left to its default.

    Source: vllm/engine/arg_utils.py at commit 99d7eb5 and vllm/config/cache.py at c1d8642, about
    version 0.11; the documentation of version 0.29 for what has changed since.
    """
    values = profile.values
    page_size = values.get("page_size")
    chunk, active = values.get("prefill_chunk"), values.get("max_num_active_seqs")
    if isinstance(chunk, int) and isinstance(active, int):
        chunk += active
    flags: dict[str, KnobValue] = {
        "dtype": profile.key.dtype,
        "block-size": page_size if page_size in VLLM_BLOCK_SIZES else None,
        "max-num-seqs": active,
        "max-num-batched-tokens": chunk,
        "gpu-memory-utilization": round(memory.vllm_frac, 3) if memory else None,
    }
    return {name: value for name, value in flags.items() if value is not None}


def sglang_flags(profile: Profile, *, memory: DeviceMemory | None) -> dict[str, KnobValue]:
    """SGLang's names. It refuses a chunk that is no multiple of the page.

    Source: python/sglang/srt/server_args.py at commit 001067f (2026).
    """
    page_size, chunk = profile.values.get("page_size"), profile.values.get("prefill_chunk")
    if isinstance(page_size, int) and isinstance(chunk, int):
        chunk = max(chunk // page_size, 1) * page_size
    flags: dict[str, KnobValue] = {
        "dtype": profile.key.dtype,
        "page-size": page_size,
        "max-running-requests": profile.values.get("max_num_active_seqs"),
        "chunked-prefill-size": chunk,
        "mem-fraction-static": round(memory.sglang_frac, 3) if memory else None,
    }
    return {name: value for name, value in flags.items() if value is not None}


def _flags(command: str, flags: Mapping[str, KnobValue], profile: Profile) -> str:
    words = [command.format(model=shlex.quote(profile.key.model))]
    words += [f"--{name} {value}" for name, value in flags.items()]
    lines = (*_header(profile), *_losses(profile, flags), " \\\n  ".join(words), "")
    return "\n".join(lines)


def _yaml(profile: Profile, flags: Mapping[str, KnobValue]) -> str:
    settings = {"model": profile.key.model, **flags}
    lines = (f"{name}: {_quoted(value)}" for name, value in settings.items())
    return "\n".join((*_header(profile), *_losses(profile, flags), *lines, ""))


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


def _losses(profile: Profile, flags: Mapping[str, KnobValue]) -> tuple[str, ...]:
    ours = ("token_budget", "hbm_budget", "residency_watermark")
    lost = [name for name in ours if name in profile.values]
    notes = [
        "# flag names change between versions: compare with --help of the installed one",
        "# the gain was measured with sparsed, and says nothing about this engine",
    ]
    if lost:
        notes.append(f"# lost, no counterpart for a densely trained model: {', '.join(lost)}")
    if "page_size" in profile.values and not {"block-size", "page-size"} & set(flags):
        size = profile.values["page_size"]
        notes.append(f"# page_size {size} is left out: not every version and backend takes it")
    if not {"gpu-memory-utilization", "mem-fraction-static"} & set(flags):
        notes.append("# no memory fraction: it is made from bytes of a GPU, which are not known")
    return tuple(notes)
