"""The flags of `sparsed start`: one table, and the decorator that gives them to a verb.

Knobs become flags by their specification; the values stay text, and are read where the file and
the environment are read too, so that every source has the same rules and the same messages.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from sparsed.controller.config import DaemonConfig
from sparsed.core import KNOB_SPECS, KnobSpec

Verb = TypeVar("Verb", bound=Callable[..., None])

# Spellings of vLLM and SGLang, where the meaning is the same.
_ALIASES = {
    "page_size": ("--block-size",),
    "prefill_chunk": ("--max-num-batched-tokens", "--chunked-prefill-size"),
    "max_model_len": ("--context-length",),
    "max_num_seqs": ("--max-running-requests",),
    "tensor_parallel_size": ("--tp",),
}
_FIELDS = {"shutdown_timeout": "drain_timeout_s"}  # where the configuration says it otherwise


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag; ``default`` is for the help text alone."""

    name: str
    metavar: str
    help: str
    default: str | None = None
    is_switch: bool = False

    @property
    def spellings(self) -> tuple[str, ...]:
        return (f"--{self.name.replace('_', '-')}", *_ALIASES.get(self.name, ()))

    @property
    def parameter(self) -> inspect.Parameter:
        aliases = _ALIASES.get(self.name)
        suffix = "" if self.default is None else f" Default: {self.default}."
        suffix += f" Also: {', '.join(aliases)}." if aliases else ""
        option = typer.Option(
            *self.spellings,
            metavar=None if self.is_switch else self.metavar,
            help=f"{self.help}.{suffix}",
            show_default=False,
        )
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[bool | None if self.is_switch else str | None, option],
        )


def _option(name: str, metavar: str, help: str, *, is_switch: bool = False) -> Flag:
    field = _FIELDS.get(name, name)
    defaults = {item.name: item.default for item in dataclasses.fields(DaemonConfig)}
    default = None if is_switch else defaults.get(field)
    text = None if default in (None, dataclasses.MISSING) else str(default)
    return Flag(name=name, metavar=metavar, help=help, default=text, is_switch=is_switch)


def _knob_flag(spec: KnobSpec) -> Flag:
    fixed = "from the machine" if spec.default is None else str(spec.default)
    unit = spec.unit.upper() or "NAME"
    return Flag(
        name=spec.name,
        metavar=unit,
        help=f"{spec.help[0].upper()}{spec.help[1:]}; {spec.allowed}",
        default="auto" if spec.auto and spec.default is None else fixed,
    )


KNOB_FLAGS = tuple(_knob_flag(spec) for spec in KNOB_SPECS)
TRIAL_FLAGS = tuple(flag for flag in KNOB_FLAGS if flag.name != "profiler")  # always measured
MODEL_FLAGS = (
    _option(
        "model",
        "MODEL",
        "A directory, a .gguf file, a hub id, a built-in name or dummy:SHAPE; also as the argument",
    ),
    _option("state_dir", "DIR", "Where database, log and sockets live"),
    _option("device", "DEVICE", "auto, cpu, cuda or cuda:N"),
    _option("dtype", "NAME", "auto, float32, bfloat16 or float16"),
    _option("seed", "N", "Seed of dummy weights, of requests without their own, and of a search"),
    _option("tensor_parallel_size", "N", "GPUs of one model; only 1 is supported"),
    _option("slo_ttft_ms", "MS", "Target of the time to the first token, milliseconds"),
    _option("slo_tpot_ms", "MS", "Target of the time per further token, milliseconds"),
    _option(
        "min_recall",
        "SHARE",
        "Floor of attention recall, mean of the samples, a target like those of times; without one "
        "the live tuner leaves token_budget and retrieval_stride alone",
    ),
)
DEVICES_FLAG = _option(
    "device",
    "DEVICES",
    "auto, cpu, cuda or cuda:N; or a list of GPUs of one kind, as cuda:0,cuda:1, each with trials "
    "of its own",
)
WINNER_RECALL_FLAG = _option(
    "min_recall",
    "SHARE",
    "Attention recall that a winner must keep. Default: 3 % below the default's, and the acceptance "
    "test must show that no more is lost",
)
SERVING_FLAGS = (
    _option("served_model_name", "NAME", "Name of the model in the HTTP interface"),
    _option("host", "ADDRESS", "Address the HTTP interface listens on"),
    _option("port", "N", "Port of the HTTP interface"),
    _option(
        "api_key", "KEY", "Clients must send it as a bearer token; SPARSED_API_KEY hides it from ps"
    ),
    _option("shutdown_timeout", "SECONDS", "Time running requests get at a stop"),
    _option(
        "max_queued_requests", "N", "Requests that wait, beyond those that run; more get a 503"
    ),
    _option(
        "regime_dwell",
        "SECONDS",
        "How long another load must last before the live tuner takes it for one, and in mode auto "
        "switches to what is verified for it",
    ),
    _option(
        "recall_floor",
        "SHARE",
        "Attention recall under which a single request reads more, then everything; 0 turns that off",
    ),
    _option(
        "no_profile", "", "Ignore stored profiles, and what the live tuner proved", is_switch=True
    ),
    _option(
        "enforce_eager",
        "",
        "On a GPU: capture no CUDA graphs; slower, for debugging",
        is_switch=True,
    ),
    _option(
        "always_select",
        "",
        "On a GPU: select pages even where attending to all is faster; without it texts may depend "
        "on the load, also after a crash",
        is_switch=True,
    ),
    _option(
        "verify_kv", "MODE", "off, sample or full: hash pages on both tiers to find broken copies"
    ),
    _option(
        "selection_trace",
        "FILE",
        "For measurements: replay a recording's selections of pages in place of the model's own",
    ),
)


def takes(*flags: Flag) -> Callable[[Verb], Verb]:
    """Replace the ``**`` parameter of a verb by ``flags``; one not given arrives as None."""

    def replace(verb: Verb) -> Verb:
        signature = inspect.signature(verb, eval_str=True)
        own = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters = [*own, *(flag.parameter for flag in flags)]
        wrapped: Any = verb
        wrapped.__signature__ = signature.replace(parameters=parameters)
        return verb

    return replace
