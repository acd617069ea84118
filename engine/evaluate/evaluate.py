"""``sparsed eval``: from what was asked for to a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sparsed.core import Evaluate, EvaluationReport, InputError, RankMethod
from sparsed.engine.assembly import device_name, library_versions, load_decoder
from sparsed.engine.evaluate.calibrate import calibrate
from sparsed.engine.evaluate.calibration import Calibration, load_calibration, save_calibration
from sparsed.engine.evaluate.needles import Needle, make_needles
from sparsed.engine.evaluate.race import Race
from sparsed.engine.evaluate.texts import (
    QUESTIONS,
    Window,
    cut_windows,
    load_tokenizer,
    read_tokens,
)
from sparsed.engine.models.config import ModelConfig, load_config
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.sparse.learned import learn_model_basis

HAYSTACK = "documentation"
NEEDLE_LENGTHS = (4, 2, 1)  # the context over these
GATE_DIMS = 64
SEED = 0

Progress = Callable[[str, float], None]


def evaluate(wanted: Evaluate, *, on_progress: Progress) -> EvaluationReport:
    """Run the race. Errors: InputError for a model, text, choice or calibration that is wrong."""
    device = torch.device(wanted.device)
    torch.set_float32_matmul_precision("high")
    config = load_config(Path(wanted.model))
    _check_length(wanted, config)
    on_progress("reading texts", 0.0)
    texts, held_out = _cut(wanted)
    needles = _needles(wanted)
    calibration = _read_calibration(wanted, config, held_out)
    started_s = time.perf_counter()
    decoder = load_decoder(
        wanted.model, device=device, dtype=getattr(torch, wanted.dtype), on_progress=on_progress
    )
    seconds = {"load": time.perf_counter() - started_s}
    if wanted.calibration is not None and wanted.calibrate:
        started_s = time.perf_counter()
        calibration = learn(wanted, decoder, held_out, on_progress=on_progress)
        save_calibration(calibration, Path(wanted.calibration))
        seconds["calibrate"] = time.perf_counter() - started_s
    elif calibration is None and any(choice.kept_dims for choice in wanted.choices):
        started_s = time.perf_counter()
        calibration = borrow_basis(wanted, decoder, on_progress=on_progress)
        seconds["basis"] = time.perf_counter() - started_s
    race = Race(decoder, wanted.choices, calibration=calibration)
    quality = [
        row
        for name, windows in texts.items()
        for row in race.run_text(name, windows, on_progress=on_progress)
    ]
    scores = race.run_needles(needles, on_progress=on_progress)
    return EvaluationReport(
        model=wanted.model,
        device_name=device_name(device),
        dtype=wanted.dtype,
        versions=library_versions(),
        context_tokens=wanted.context_tokens,
        scored_tokens=wanted.scored_tokens,
        num_windows=wanted.num_windows,
        quality=tuple(quality),
        needles=tuple(scores),
        seconds=seconds | dict(race.seconds),
    )


def _cut(wanted: Evaluate) -> tuple[dict[str, list[Window]], list[Window]]:
    """Windows of each text that is judged, and those that a calibration learns from, or learned
    from when it was made: the last window of every text but the questions."""
    texts, held_out = {}, []
    for name in wanted.texts:
        spare = int(wanted.calibration is not None and name != QUESTIONS)
        windows = cut_windows(
            name,
            tokenizer=_tokenizer(wanted),
            cache_dir=Path(wanted.cache_dir),
            count=wanted.num_windows + spare,
            context_tokens=wanted.context_tokens,
            scored_tokens=wanted.scored_tokens,
        )
        texts[name] = windows[: wanted.num_windows]
        held_out += windows[wanted.num_windows :]
    return texts, held_out


def _read_calibration(
    wanted: Evaluate, config: ModelConfig, held_out: Sequence[Window]
) -> Calibration | None:
    """The one that is named, unless it is yet to be made; InputError if it never can be."""
    if wanted.calibration is None:
        return None
    if not wanted.calibrate:
        device = torch.device(wanted.device)
        found = load_calibration(Path(wanted.calibration), device=device, shape=config.shape)
        if _has_gate(wanted):
            found.gate(0)  # says so where none was learned
        _check_held_out(wanted, found)
        return found
    if not held_out:
        raise InputError(
            "nothing to calibrate on: name a text besides the questions", field="texts"
        )
    return None


def _check_held_out(wanted: Evaluate, calibration: Calibration) -> None:
    """InputError if what the calibration was learned from might be judged."""
    cut = _describe_cut(wanted)
    for text in wanted.texts:
        learned = calibration.learned_from.get(text, cut)
        if learned != cut:
            raise InputError(
                f"the calibration was learned from a part of {text} beside {learned}; {cut} might "
                "judge that part: give the same numbers, other texts, or calibrate again",
                field="calibration",
            )


def _describe_cut(wanted: Evaluate) -> str:
    return f"{wanted.num_windows} windows of {wanted.context_tokens} + {wanted.scored_tokens}"


def learn(
    wanted: Evaluate, decoder: Decoder, windows: Sequence[Window], *, on_progress: Progress
) -> Calibration:
    """A calibration; with gates, which take most of the time, where a choice needs one."""
    gate_dims = GATE_DIMS if _has_gate(wanted) else None
    made = calibrate(decoder, windows, gate_dims=gate_dims, on_progress=on_progress)
    learned_from = {name: _describe_cut(wanted) for name in wanted.texts if name != QUESTIONS}
    return Calibration(made.tensors, learned_from=learned_from)


def borrow_basis(wanted: Evaluate, decoder: Decoder, *, on_progress: Progress) -> Calibration:
    """A calibration of nothing but a basis: the one that an engine learns by itself."""
    keys_LHDD, queries_LHDD, centre_LHD = learn_model_basis(
        wanted.model,
        decoder,
        max_tokens=wanted.context_tokens + wanted.scored_tokens,
        num_dims=decoder.config.head_dim,
        on_progress=lambda frac: on_progress("learning a basis of keys", frac),
    )
    return Calibration(
        {"basis.keys": keys_LHDD, "basis.queries": queries_LHDD, "basis.centre": centre_LHD}
    )


def _has_gate(wanted: Evaluate) -> bool:
    return any(choice.method is RankMethod.GATE for choice in wanted.choices)


def _needles(wanted: Evaluate) -> list[Needle]:
    if not wanted.needles:
        return []
    tokenizer = _tokenizer(wanted)
    haystack = read_tokens(HAYSTACK, tokenizer=tokenizer, cache_dir=Path(wanted.cache_dir))
    return make_needles(
        tokenizer,
        haystack,
        lengths=[wanted.context_tokens // part for part in NEEDLE_LENGTHS],
        depths=[(i + 0.5) / wanted.needle_depths for i in range(wanted.needle_depths)],
        per_cell=wanted.needles,
        seed=SEED,
    )


def _check_length(wanted: Evaluate, config: ModelConfig) -> None:
    needed, most = wanted.context_tokens + wanted.scored_tokens, config.max_position
    if needed > most:
        raise InputError(
            f"{wanted.context_tokens} + {wanted.scored_tokens} tokens are more than the "
            f"{most} of the model: take a shorter context",
            field="context_tokens",
        )


def _tokenizer(wanted: Evaluate) -> Tokenizer:
    return load_tokenizer(Path(wanted.model))
