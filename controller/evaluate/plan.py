"""From what was asked for to an evaluation by a process of its own, checked beforehand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from sparsed.controller.bench.process import Progress, run_measurement
from sparsed.controller.config import DaemonConfig
from sparsed.controller.startup import choose_dtype, find_device, find_model
from sparsed.controller.state_dir import StateLock
from sparsed.controller.tokenizer import Tokenizer
from sparsed.controller.writable import check_replaceable
from sparsed.core import (
    MEAN_KEY,
    BudgetRule,
    Choice,
    Evaluate,
    EvaluationReport,
    InputError,
    ModelShape,
    RankMethod,
)
from sparsed.engine.evaluate.texts import TEXTS
from sparsed.engine.kvcache.geometry import Geometry

COMMAND: Final = (sys.executable, "-P", "-m", "sparsed.engine.evaluate")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What to evaluate; fields as those of ``Evaluate``."""

    choices: tuple[Choice, ...]
    texts: tuple[str, ...]
    context_tokens: int
    scored_tokens: int
    num_windows: int
    needles: int
    needle_depths: int
    calibration: Path | None = None
    calibrate: bool = False


def run_evaluation(
    config: DaemonConfig, options: EvaluateOptions, *, on_progress: Progress
) -> EvaluationReport:
    """The race, in a process that may load torch.

    Errors: InputError for model, device, texts, choices or calibration; StartError, TEMPORARY
    beside a daemon of the same state directory, else as the process says.
    """
    with StateLock(config.state_dir, verb="eval"):
        wanted = plan_evaluation(config, options, on_progress=on_progress)
        report = run_measurement(
            COMMAND,
            msgspec.json.encode(wanted),
            answer=EvaluationReport,
            on_progress=on_progress,
        )
        on_progress("evaluated", 1.0)
        return report


def plan_evaluation(
    config: DaemonConfig, options: EvaluateOptions, *, on_progress: Progress
) -> Evaluate:
    """Find model and device; InputError for all that can be told before a model is loaded."""
    check_texts(options.texts)
    check_place(options)
    device, _ = find_device(config.device)
    resolved, model = find_model(config, progress=on_progress)
    if resolved.path is None:
        raise InputError(
            f"--model {config.model}: a dummy has no tokenizer to read texts with; give a real one",
            field="model",
        )
    Tokenizer.load(resolved.path)  # refuses a broken one
    _check_context(options, most=model.max_position)
    choices = tuple(fit_default(choice, model.shape) for choice in options.choices)
    for choice in choices:
        _check_choice(choice, model.shape)
    check_calibration(options)
    return Evaluate(
        model=str(resolved.path),
        cache_dir=str(config.cache_dir),
        device=device,
        dtype=choose_dtype(config.dtype, device=device, model=model),
        choices=choices,
        texts=options.texts,
        context_tokens=options.context_tokens,
        scored_tokens=options.scored_tokens,
        num_windows=options.num_windows,
        needles=options.needles,
        needle_depths=options.needle_depths,
        calibration=None if options.calibration is None else str(options.calibration),
        calibrate=options.calibrate,
    )


def check_texts(texts: Sequence[str]) -> None:
    """InputError for a text that is neither built in nor a file."""
    for text in texts:
        if text not in TEXTS and not Path(text).is_file():
            raise InputError(
                f"--text {text}: there is no such file; give one, or one of {', '.join(TEXTS)}",
                field="text",
            )


def check_place(options: EvaluateOptions) -> None:
    """InputError for a calibration that is not named, not there, or cannot be written."""
    path = options.calibration
    if path is None:
        if options.calibrate:
            raise InputError("--calibrate: name its file with --calibration", field="calibration")
    elif options.calibrate:
        check_replaceable(path, option="calibration")
    elif not path.is_file():
        raise InputError(
            f"--calibration {path}: there is no such file; make it with --calibrate",
            field="calibration",
        )


def check_calibration(options: EvaluateOptions) -> None:
    """InputError for a choice that needs a calibration where none is named."""
    for choice in options.choices:
        if options.calibration is None and needs_calibration(choice):
            raise InputError(
                f"--choice {choice.method}: needs a calibration of this model; make one with "
                "--calibration FILE --calibrate",
                field="calibration",
            )


def needs_calibration(choice: Choice) -> bool:
    """Whether a choice uses what is learned of a model, but for a basis, which any run learns."""
    return choice.method is RankMethod.GATE or choice.budgets is not BudgetRule.EQUAL


def fit_default(choice: Choice, shape: ModelShape) -> Choice:
    """As an engine does, with fewer dims in small heads."""
    if choice != replace(MEAN_KEY, share=choice.share):
        return choice
    return replace(
        choice, kept_dims=Geometry.of(shape, dtype="float32", page_size=choice.page_size).kept_dims
    )


def _check_context(options: EvaluateOptions, *, most: int) -> None:
    if options.context_tokens + options.scored_tokens > most:
        raise InputError(
            f"--context {options.context_tokens} and --scored {options.scored_tokens}: the model "
            f"has {most} positions for both; give at most {most - options.scored_tokens} of context",
            field="context",
        )


def _check_choice(choice: Choice, shape: ModelShape) -> None:
    if choice.kept_dims is not None and choice.kept_dims > shape.head_dim:
        raise InputError(
            f"--choice: kept_dims={choice.kept_dims}: keys of this model have {shape.head_dim} dims",
            field="kept_dims",
        )
    if choice.dense_layers >= choice.share * shape.num_layers and choice.dense_layers:
        raise InputError(
            f"--choice: dense_layers={choice.dense_layers} of {shape.num_layers} layers alone read "
            f"more than a share of {choice.share:.4g}; take fewer or a larger share",
            field="dense_layers",
        )
