"""Makes a calibration of a model from texts that it is not judged on.

Shape legend: L layers, N positions, H KV heads, G query heads per KV head, D head dim, M tokens,
P pages, R dims of the gate's maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from sparsed.core import Choice, RankMethod
from sparsed.engine.evaluate.calibration import Calibration, budget_factors
from sparsed.engine.evaluate.context import Context
from sparsed.engine.evaluate.distill import UNIT_TOKENS, Lesson, distill_gate, start_maps
from sparsed.engine.evaluate.methods import Methods
from sparsed.engine.evaluate.parallel import ParallelDecode
from sparsed.engine.evaluate.texts import Window
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.sparse.basis import Moments, product_basis

CURVE_PAGE_TOKENS: Final = 16
CURVE_SHARE: Final = 1 / 16
CURVE_POSITIONS: Final = 256

Progress = Callable[[str, float], None]


class _Recorded:
    """The queries of every layer over a text, decoded densely."""

    def __init__(self, decoder: Decoder, window: Window) -> None:
        self.context = Context(decoder, window.context, num_scored=len(window.scored))
        dense = Methods(
            Choice(method=RankMethod.DENSE),
            num_layers=decoder.config.shape.num_layers,
            num_tokens=len(window.context),
            scale=self.context.scale,
        )
        self._attend_dense = ParallelDecode(self.context, dense)
        self.queries: list[Tensor] = []  # (N, H, G, D) of each layer, in the model's dtype
        device = self.context.keys_LHMD.device
        tokens_N = torch.tensor(window.scored, device=device)
        positions_N = torch.arange(len(tokens_N), device=device) + self.context.num_tokens
        decoder.forward(tokens_N, positions_N, self._attend)

    def _attend(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        self.queries.append(torch.unflatten(q_NHD, 1, (k_NHD.shape[1], -1)))
        return self._attend_dense(layer, q_NHD, k_NHD, v_NHD)

    def lesson(self, layer: int) -> Lesson:
        """One layer of the text."""
        first = self.context.num_tokens
        end = (first + len(self.queries[layer])) // UNIT_TOKENS * UNIT_TOKENS
        keys_HMD = self.context.keys_LHMD[layer, :, :end].float()
        return Lesson(self.queries[layer][: end - first].float(), keys_HMD, first)


@torch.inference_mode(False)
@torch.no_grad()
def calibrate(
    decoder: Decoder, windows: Sequence[Window], *, gate_dims: int | None, on_progress: Progress
) -> Calibration:
    """Bases of products, budgets by layer and head and, with ``gate_dims``, learned gates."""
    recorded = [_Recorded(decoder, window) for window in windows]
    found: dict[str, list[Tensor]] = {}
    num_layers = decoder.config.shape.num_layers
    for layer in range(num_layers):
        on_progress(f"calibrating layer {layer + 1}", layer / num_layers)
        lessons = [text.lesson(layer) for text in recorded]
        scale = recorded[0].context.scale
        for name, value in _learn(lessons, gate_dims=gate_dims, scale=scale).items():
            found.setdefault(name, []).append(value)
    tensors = {name: torch.stack(values) for name, values in found.items()}
    factors = budget_factors(tensors.pop("curve"), share=CURVE_SHARE)
    return Calibration(tensors | factors)


def _learn(lessons: Sequence[Lesson], *, gate_dims: int | None, scale: float) -> dict[str, Tensor]:
    """What one layer adds to a calibration, and its curve of attention."""
    q_NHGD = torch.cat([lesson.q_NHGD for lesson in lessons])
    moments = Moments.of(q_NHGD, torch.cat([x.keys_HMD for x in lessons], dim=1))
    keys, queries, centre = product_basis(moments)
    curves = [_curve(lesson, scale=scale) for lesson in lessons]
    num_pages = min(curve.shape[-1] for curve in curves)
    learned = {
        "basis.keys": keys,
        "basis.queries": queries,
        "basis.centre": centre,
        "curve": torch.stack([curve[:, :num_pages] for curve in curves]).mean(0),
    }
    if gate_dims is not None:
        start = start_maps(keys[..., :gate_dims], queries[..., :gate_dims], group=q_NHGD.shape[2])
        learned["gate.keys"], learned["gate.queries"] = distill_gate(
            lessons, start_keys_HER=start[0], start_queries_HGDR=start[1], scale=scale
        )
    return learned


def _curve(lesson: Lesson, *, scale: float) -> Tensor:
    """Mean attention of the group to the best page of a lane, to the second best, ...: (H, P)."""
    stride = max(1, len(lesson.q_NHGD) // CURVE_POSITIONS)
    keys_HMD = lesson.keys_HMD[:, : lesson.first // CURVE_PAGE_TOKENS * CURVE_PAGE_TOKENS]
    logits = torch.einsum("nhgd,hmd->nhgm", lesson.q_NHGD[::stride] * scale, keys_HMD)
    mass_nHP = torch.unflatten(logits.softmax(-1), -1, (-1, CURVE_PAGE_TOKENS)).sum(-1).mean(2)
    return mass_nHP.sort(dim=-1, descending=True).values.mean(0)
