"""Records which pages a ranking puts first, step by step, for replay and simulation of caches.

Run from the root: ``PYTHONPATH=benchmarks python benchmarks/record_selection.py --output DIR``;
one file a text, as ``sparsed.engine.evaluate.recording`` reads them. Decode runs with the pages
of the budget, of the finest size, and four times as many are listed. The calibration is learned
from the window after the recorded one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from ranker_race import FINE
from report import cache_directory, environment, resolve_builtin

from sparsed.core import Choice
from sparsed.engine.assembly import load_decoder
from sparsed.engine.evaluate.calibrate import calibrate
from sparsed.engine.evaluate.context import Context
from sparsed.engine.evaluate.methods import Methods
from sparsed.engine.evaluate.parallel import Scores, score_text
from sparsed.engine.evaluate.recording import Recording, RecordingHeader, write_recording
from sparsed.engine.evaluate.texts import Window, cut_windows, load_tokenizer
from sparsed.engine.models.decoder import Decoder

TEXTS: Final = ("prose", "documentation", "code")
RANKS: Final = 4  # listed pages over those that are read


def rank_pages(decoder: Decoder, window: Window, held_out: Window, choice: Choice) -> Scores:
    """Decode a window by the calibration of another; its pages are listed four times over."""
    calibration = calibrate(
        decoder, [held_out], gate_dims=None, on_progress=lambda phase, frac: None
    )
    context = Context(decoder, window.context, num_scored=len(window.scored))
    methods = Methods(
        choice,
        num_layers=decoder.config.shape.num_layers,
        num_tokens=len(window.context),
        scale=context.scale,
        calibration=calibration,
        ranks=RANKS,
    )
    return score_text(decoder, context, window.scored, methods=methods)


def make_recording(scores: Scores, header: RecordingHeader) -> Recording:
    """Pages of all layers side by side."""
    pages = [layer.pages_NHK.cpu().numpy() for layer in scores.layers]
    return Recording(header=header, ranked_SLR=np.concatenate(pages, axis=1).astype(np.int32))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: built-in)")
    parser.add_argument("--output", type=Path, required=True, help="directory of the recordings")
    parser.add_argument("--cache", type=Path, default=cache_directory(), help="of the texts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=6144)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--budget", type=int, default=1024, help="tokens read, of each lane")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    model = options.model or resolve_builtin()
    decoder = load_decoder(
        str(model),
        device=torch.device(options.device),
        dtype=getattr(torch, options.dtype),
        on_progress=lambda phase, frac: None,
    )
    choice = replace(FINE, share=options.budget / options.context)
    options.output.mkdir(parents=True, exist_ok=True)
    for text in options.texts:
        window, held_out = cut_windows(
            text,
            tokenizer=load_tokenizer(model),
            cache_dir=options.cache,
            count=2,
            context_tokens=options.context,
            scored_tokens=options.steps,
        )
        header = RecordingHeader(
            model=model.name,
            text=text,
            method=str(choice),
            commit=str(environment()["commit"]),
            context_tokens=options.context,
            page_size=choice.page_size,
            token_budget=options.budget,
            sink_pages=choice.sink_pages,
            recent_pages=choice.recent_pages,
            num_kv_heads=decoder.config.shape.num_kv_heads,
            dense_layers=choice.dense_layers,
        )
        recording = make_recording(rank_pages(decoder, window, held_out, choice), header)
        path = options.output / f"{text}-{options.context}-b{options.budget}.npz"
        write_recording(path, recording)
        print(f"{path}: {recording.ranked_SLR.shape} in {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
