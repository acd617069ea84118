"""``sparsed eval``: from what was asked for to a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sparsed.core import Evaluate, EvaluationReport, InputError
from sparsed.engine.assembly import device_name, library_versions, load_decoder
from sparsed.engine.evaluate.calibrate import calibrate
from sparsed.engine.evaluate.calibration import Calibration, load_calibration, save_calibration
from sparsed.engine.evaluate.needles import Needle, make_needles
from sparsed.engine.evaluate.race import Race
from sparsed.engine.evaluate.texts import QUESTIONS, Window, cut_windows, read_tokens
from sparsed.engine.models.decoder import Decoder

HAYSTACK = "documentation"
NEEDLE_LENGTHS = (4, 2, 1)  # the context over these
GATE_DIMS = 64
SEED = 0

Progress = Callable[[str, float], None]


def evaluate(wanted: Evaluate, *, on_progress: Progress) -> EvaluationReport:
    """Run the race. Errors: InputError for a model, text, choice or calibration that is wrong."""
    device = torch.device(wanted.device)
    torch.set_float32_matmul_precision("high")
    started_s = time.perf_counter()
    decoder = load_decoder(
        wanted.model, device=device, dtype=getattr(torch, wanted.dtype), on_progress=on_progress
    )
    _check_length(wanted, decoder)
    seconds = {"load": time.perf_counter() - started_s}
    on_progress("reading texts", 0.0)
    texts, held_out = _cut(wanted)
    needles = _needles(wanted)
    started_s = time.perf_counter()
    calibration = _calibration(wanted, decoder, held_out, on_progress=on_progress)
    seconds["calibrate"] = time.perf_counter() - started_s
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
    """Windows of each text that is judged, and those that a calibration may learn from: where one
    is made, the last window of every text but the questions, which no text is judged on."""
    texts, held_out = {}, []
    for name in wanted.texts:
        spare = int(wanted.calibrate and name != QUESTIONS)
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


def _calibration(
    wanted: Evaluate, decoder: Decoder, windows: list[Window], *, on_progress: Progress
) -> Calibration | None:
    if wanted.calibration is None:
        return None
    path = Path(wanted.calibration)
    if not wanted.calibrate:
        return load_calibration(path, device=torch.device(wanted.device))
    if not windows:
        raise InputError(
            "nothing to calibrate on: name a text besides the questions", field="texts"
        )
    made = calibrate(decoder, windows, gate_dims=GATE_DIMS, on_progress=on_progress)
    save_calibration(made, path)
    return made


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


def _check_length(wanted: Evaluate, decoder: Decoder) -> None:
    needed, most = wanted.context_tokens + wanted.scored_tokens, decoder.config.max_position
    if needed > most:
        raise InputError(
            f"{wanted.context_tokens} + {wanted.scored_tokens} tokens are more than the "
            f"{most} of the model: take a shorter context",
            field="context_tokens",
        )


def _tokenizer(wanted: Evaluate) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(Path(wanted.model) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
