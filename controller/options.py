"""What each setting of a daemon may be: a parser for each, whatever source it came from.

InputErrors name what the user wrote, and say what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sparsed.controller.control import KnobSource
from sparsed.core import DTYPE_BYTES, KNOBS_BY_NAME, InputError, KnobValue, VerifyMode

ENVIRONMENT_PREFIX = "SPARSED_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """One value as it was given; ``where`` is the name to blame, as the user wrote it."""

    value: object
    source: KnobSource
    where: str


def parse_knob(name: str, given: Given) -> KnobValue:
    """The value of the knob ``name``; None is auto."""
    spec = KNOBS_BY_NAME[name]
    from_toml = given.source in (KnobSource.FILE, KnobSource.LIVE)
    is_text = isinstance(given.value, str) and given.value != "auto"
    if from_toml and is_text and not (spec.choices and isinstance(spec.choices[0], str)):
        raise InputError(
            f"{given.where}: {given.value!r} is text, not a number; "
            f"remove the quotes ({spec.allowed})",
            field=name,
        )
    try:
        return spec.check(given.value)
    except InputError as error:
        raise InputError(f"{given.where}: {error}", field=name) from None


def _refuse(given: Given, allowed: str) -> NoReturn:
    name = re.split(r"[ =]", given.where)[0].lstrip("-").removeprefix(ENVIRONMENT_PREFIX)
    raise InputError(
        f"{given.where}: {given.value!r} is not {allowed}", field=name.replace("-", "_").lower()
    )


def _text(given: Given) -> str:
    if not isinstance(given.value, str) or not given.value.strip():
        _refuse(given, "a text (in quotes in a file, and not empty)")
    return given.value


def parse_path(given: Given) -> Path:
    """Not checked for what is there."""
    return Path(given.value if isinstance(given.value, Path) else _text(given))


def _number(minimum: float, maximum: float, *, unit: str) -> Callable[[Given], float]:
    def parse(given: Given) -> float:
        allowed = f"a number from {minimum:g} to {maximum:g}{unit}"
        if isinstance(given.value, bool) or (
            given.source is KnobSource.FILE and isinstance(given.value, str)
        ):
            _refuse(given, allowed)
        try:
            number = float(str(given.value))
        except ValueError:
            _refuse(given, allowed)
        if not minimum <= number <= maximum:
            _refuse(given, allowed)
        return number

    return parse


def _integer(minimum: int, maximum: int) -> Callable[[Given], int]:
    parse_number = _number(minimum, maximum, unit="")

    def parse(given: Given) -> int:
        number = parse_number(given)
        if number != int(number):
            _refuse(given, "a whole number")
        return int(number)

    return parse


def _boolean(given: Given) -> bool:
    if isinstance(given.value, bool):
        return given.value
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if given.source is KnobSource.FILE or str(given.value).lower() not in words:
        _refuse(given, "true or false")
    return words[str(given.value).lower()]


def _pattern(pattern: str, *, allowed: str) -> Callable[[Given], str]:
    def parse(given: Given) -> str:
        if not re.fullmatch(pattern, str(given.value)):
            _refuse(given, f"one of {allowed}")
        return str(given.value)

    return parse


def _device(given: Given) -> str:
    if "," in str(given.value):
        raise InputError(
            f"{given.where}: {given.value!r} is a list of GPUs, which only the flag of a search "
            "takes: sparsed tune --device cuda:0,cuda:1; give one of them here",
            field="device",
        )
    return _pattern(r"auto|cpu|cuda(:\d{1,3})?", allowed="auto, cpu, cuda, cuda:N")(given)


def _milliseconds(given: Given) -> float:
    """Targets are given in milliseconds and kept in seconds."""
    return _number(0.001, 1e9, unit=" ms")(given) / 1e3


def _one_gpu(given: Given) -> int:
    size = _integer(1, 1024)(given)
    if size > 1:
        raise InputError(
            f"{given.where}: a model over {size} GPUs is not supported; "
            "start one daemon per GPU with --device cuda:N",
            field="tensor_parallel_size",
        )
    return size


OPTIONS: Mapping[str, Callable[[Given], object]] = {
    "model": _text,
    "served_model_name": _text,
    "host": _text,
    "port": _integer(1, 65535),
    "state_dir": parse_path,
    "api_key": _text,
    "device": _device,
    "dtype": _pattern("|".join(("auto", *DTYPE_BYTES)), allowed=", ".join(("auto", *DTYPE_BYTES))),
    "slo_ttft_ms": _milliseconds,
    "slo_tpot_ms": _milliseconds,
    "min_recall": _number(0, 1, unit=""),
    "shutdown_timeout": _number(0, 86400, unit=" s"),
    "max_queued_requests": _integer(0, 1_000_000),
    "regime_dwell": _number(1, 86400, unit=" s"),
    "recall_floor": _number(0, 0.99, unit=""),
    "seed": _integer(0, 2**31 - 1),
    "no_profile": _boolean,
    "enforce_eager": _boolean,
    "always_select": _boolean,
    "verify_kv": _pattern("|".join(VerifyMode), allowed=", ".join(VerifyMode)),
    "selection_trace": parse_path,
    "tensor_parallel_size": _one_gpu,
}
