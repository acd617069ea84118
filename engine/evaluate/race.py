"""The race: every choice on every window of every text, and on needles.

A window's context is prefilled once, densely, and every choice decodes the tokens after it.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sparsed.core import Choice, NeedleScore, Quality, RankMethod
from sparsed.engine.evaluate.calibration import Calibration
from sparsed.engine.evaluate.context import Context
from sparsed.engine.evaluate.locality import LocalityMeter
from sparsed.engine.evaluate.methods import Methods
from sparsed.engine.evaluate.metrics import WindowScores, measure_quality, to_host
from sparsed.engine.evaluate.needles import Needle
from sparsed.engine.evaluate.parallel import Scores, score_text
from sparsed.engine.evaluate.texts import Window
from sparsed.engine.models.decoder import Decoder

DENSE = Choice(method=RankMethod.DENSE)
LOCALITY_STEPS = 256  # of the first window of a text

Progress = Callable[[str, float], None]


class Race:
    """Choices of one model; ``dense`` is always among them, first."""

    def __init__(
        self, decoder: Decoder, choices: Sequence[Choice], *, calibration: Calibration | None
    ) -> None:
        self.choices = tuple(dict.fromkeys((DENSE, *choices)))
        self._decoder = decoder
        self._shape = decoder.config.shape
        self._calibration = calibration
        self.seconds: dict[str, float] = defaultdict(float)

    def score_window(self, window: Window, choice: Choice, context: Context) -> Scores:
        """One choice on one window whose context is prefilled."""
        methods = Methods(
            choice,
            num_layers=self._shape.num_layers,
            num_tokens=len(window.context),
            scale=context.scale,
            calibration=self._calibration,
        )
        return score_text(self._decoder, context, window.scored, methods=methods)

    def run_text(
        self, name: str, windows: Sequence[Window], *, on_progress: Progress
    ) -> list[Quality]:
        """Every choice on every window of one text. Locality is that of the first window."""
        scores: dict[Choice, list[WindowScores]] = defaultdict(list)
        meters = {choice: LocalityMeter() for choice in self.choices}
        for number, window in enumerate(windows):
            context = self._prefill(window)
            for choice in self.choices:
                on_progress(f"{name}, window {number + 1}: {choice}", number / len(windows))
                with self._clock(str(choice)):
                    scored = self.score_window(window, choice, context)
                if number == 0:
                    with self._clock("locality"):
                        _count_pages(meters[choice], scored)
                scores[choice].append(
                    to_host(scored, choice, num_kv_heads=self._shape.num_kv_heads)
                )
        return [
            measure_quality(
                name,
                choice,
                scores[choice],
                scores[DENSE],
                context_tokens=len(windows[0].context),
                locality=meters[choice],
            )
            for choice in self.choices
        ]

    def run_needles(self, needles: Sequence[Needle], *, on_progress: Progress) -> list[NeedleScore]:
        """Every choice on every needle. The question is decoded like the answer, with sparse
        attention; what counts is that every token of the answer is the likeliest."""
        found: Counter[tuple[Choice, int, float]] = Counter()
        asked: Counter[tuple[int, float]] = Counter()
        for number, needle in enumerate(needles):
            on_progress(f"needle {number + 1} of {len(needles)}", number / len(needles))
            window = Window(context=needle.context, scored=(*needle.question, *needle.answer))
            context = self._prefill(window)
            cell = needle.length, needle.depth
            asked[cell] += 1
            with self._clock("needles"):
                for choice in self.choices:
                    hits_N = self.score_window(window, choice, context).hits_N
                    found[choice, *cell] += bool(hits_N[-len(needle.answer) :].all())
        return [
            NeedleScore(
                choice=choice,
                length=length,
                depth=depth,
                num_found=found[choice, length, depth],
                num_asked=count,
            )
            for choice in self.choices
            for (length, depth), count in asked.items()
        ]

    def _prefill(self, window: Window) -> Context:
        with self._clock("prefill"):
            return Context(self._decoder, window.context, num_scored=len(window.scored))

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - started_s


def _count_pages(meter: LocalityMeter, scores: Scores) -> None:
    """Add the selections of all layers in the first steps, side by side."""
    steps = (layer.pages_NHK[:LOCALITY_STEPS] for layer in scores.layers)
    pages = [pages_SHK for pages_SHK in steps if pages_SHK.shape[-1]]
    if pages:
        most = max(x.shape[-1] for x in pages)
        padded = [torch.nn.functional.pad(x, (0, most - x.shape[-1]), value=-1) for x in pages]
        meter.add(torch.cat(padded, dim=1))
