"""What is learned of a model from a text that it is not judged on.

Shape legend: L layers, H KV heads, G query heads per KV head, D head dim, R kept dims, N positions,
M tokens, P pages, C covariance dims (D).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsed.core import BudgetRule, ExitCode, InputError, ModelShape
from sparsed.engine.sparse.gate import Gate


class Calibration:
    """Tensors by name, as they are kept in a file; a name is missing if it was never made:

    ``basis.keys`` and ``basis.queries`` (L, H, D, D): maps to dims in which products of queries
    and keys are large first; ``basis.centre`` (L, H, D): the mean key; ``budget.layer`` and ``budget.head`` (L, H): a lane's reads over the
    mean; ``gate.keys`` (L, H, 3 D, R) and ``gate.queries`` (L, H, G, D, R).

    ``learned_from``: of each text, how it was cut into the windows that were judged and the one
    that was learned from.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, learned_from: Mapping[str, str] | None = None
    ) -> None:
        self.tensors = dict(tensors)
        self.learned_from = dict(learned_from or {})

    def centre(self, layer: int) -> Tensor:
        """The layer's mean key, (H, D), which keys are less before they are mapped."""
        return self._get("basis.centre")[layer]

    def basis(self, layer: int, num_dims: int) -> tuple[Tensor, Tensor]:
        """Maps of keys and of queries to the first dims of the layer's basis: (H, D, R) each."""
        keys, queries = (self._get(name)[layer] for name in ("basis.keys", "basis.queries"))
        return keys[..., :num_dims], queries[..., :num_dims]

    def budget_factors(self, rule: BudgetRule, layer: int) -> Tensor:
        """What each KV head reads over the mean of all lanes: (H)."""
        return self._get(f"budget.{rule}")[layer]

    def gate(self, layer: int) -> Gate:
        """The layer's learned gate."""
        return Gate(self._get("gate.keys")[layer], self._get("gate.queries")[layer])

    def _get(self, name: str) -> Tensor:
        if name not in self.tensors:
            kind = name.partition(".")[0]
            raise InputError(
                f"the calibration has no {kind}: make one that has", field="calibration"
            )
        return self.tensors[name]


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the tensors as safetensors: all of them, or what was there stays. Errors: InputError
    if the file cannot be written."""
    target = path.resolve()  # where a link leads
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        tensors = {k: v.cpu().contiguous() for k, v in calibration.tensors.items()}
        save_file(tensors, beside, metadata=calibration.learned_from)
        beside.replace(target)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(
            f"calibration {path} cannot be written ({error}): give another place",
            field="calibration",
        ) from error


def load_calibration(path: Path, *, device: torch.device, shape: ModelShape) -> Calibration:
    """Read a calibration of a model with this shape. Errors: InputError if there is no such file,
    DATA if it is none or one of another model."""
    try:
        with safe_open(path, framework="pt") as file:
            learned_from = file.metadata()
        calibration = Calibration(load_file(path, device=str(device)), learned_from=learned_from)
    except (OSError, SafetensorError) as error:
        is_there = isinstance(error, SafetensorError)
        raise InputError(
            f"calibration {path} cannot be read ({error}): give a file that was written by one",
            field="calibration",
            code=ExitCode.DATA if is_there else ExitCode.USAGE,
        ) from error
    _check_shapes(calibration, shape, path=path)
    return calibration


def _check_shapes(calibration: Calibration, shape: ModelShape, *, path: Path) -> None:
    expected, tensors = _shapes(calibration, shape), calibration.tensors
    if not expected.keys() & tensors.keys():
        raise InputError(
            f"calibration {path} has nothing that one has: give a file that was written by one",
            field="calibration",
            code=ExitCode.DATA,
        )
    for name, sizes in expected.items():
        if name in tensors and tuple(tensors[name].shape) != sizes:
            raise InputError(
                f"calibration {path} is one of another model: {name} has the shape "
                f"{tuple(tensors[name].shape)}, and of this model it has {sizes}",
                field="calibration",
                code=ExitCode.DATA,
            )


def _shapes(calibration: Calibration, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Of every tensor that a calibration may have; R of both maps is that of the gate's keys."""
    lanes = shape.num_layers, shape.num_kv_heads
    dims, group = shape.head_dim, shape.num_heads // shape.num_kv_heads
    gate = calibration.tensors.get("gate.keys")
    kept = gate.shape[-1] if gate is not None and gate.dim() else 0
    return {
        "basis.keys": (*lanes, dims, dims),
        "basis.queries": (*lanes, dims, dims),
        "basis.centre": (*lanes, dims),
        "budget.layer": lanes,
        "budget.head": lanes,
        "gate.keys": (*lanes, 3 * dims, kept),
        "gate.queries": (*lanes, group, dims, kept),
    }


def budget_factors(curves_LHP: Tensor, *, share: float) -> dict[str, Tensor]:
    """Reads of each layer and KV head over the mean, where a page more gains all lanes the same.

    ``curves_LHP``: the mean attention of a lane's best page, second best, and so on.
    """
    num_layers, num_heads, num_pages = curves_LHP.shape
    factors = {}
    for rule, curves in (
        (BudgetRule.HEAD, curves_LHP),
        (BudgetRule.LAYER, curves_LHP.mean(1, True)),
    ):
        total = round(share * num_pages * curves.shape[0] * curves.shape[1])
        least = curves.flatten().topk(total).values[-1]
        counts_LH = (curves >= least).sum(-1).float()
        factors[f"budget.{rule}"] = (counts_LH / counts_LH.mean()).expand(num_layers, num_heads)
    return factors
