"""The parameters of rotary position embedding, from either generation of config keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsed.core import InputError
from sparsed.engine.models.fields import Fields

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """One RoPE variant. ``original_max_position`` is the context in tokens before scaling; fields
    that a variant does not use keep their defaults. ``attention_factor`` scales cos and sin; None:
    the variant's own formula."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def context_tokens(self, max_position: int) -> int:
        """The context in tokens that this scaling gives a model trained for ``max_position``."""
        if self.kind in ("linear", "dynamic"):
            return int(max_position * self.factor)
        if self.kind == "yarn":
            return max(max_position, int(self.original_max_position * self.factor))
        return max_position


def parse_rope(fields: Fields, *, max_position: int) -> RopeConfig:
    """Read ``rope_parameters``, or ``rope_scaling`` with ``rope_theta`` beside it.

    Errors: InputError for an unknown kind, and naming the key that is missing or wrong.
    """
    nested = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise InputError(f"the RoPE parameters {nested!r} are no JSON object", field="model")
    rope = Fields(nested)
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    if kind not in ROPE_KINDS:
        known = ", ".join(ROPE_KINDS)
        raise InputError(f"rope_type {kind!r} is not supported; known: {known}", field="model")
    for source in (fields, rope):
        if source.number("partial_rotary_factor", default=1.0) != 1.0:
            raise InputError("partial_rotary_factor other than 1 is not supported", field="model")
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    original = max_position
    if kind in ("yarn", "llama3"):  # dynamic scaling starts at max_position_embeddings itself
        original = rope.whole("original_max_position_embeddings", default=max_position)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=_factor(rope, kind=kind, ratio=max_position / original),
        original_max_position=original,
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", default=True),
        low_freq_factor=rope.number("low_freq_factor", default=1.0),
        high_freq_factor=rope.number("high_freq_factor", default=4.0),
    )


def _factor(rope: Fields, *, kind: str, ratio: float) -> float:
    """The scaling factor; yarn alone may leave it out, and then it is the ratio of contexts."""
    if kind == "default":
        return 1.0
    factor = rope.number("factor", default=ratio if kind == "yarn" else None)
    if factor < 1.0:
        raise InputError(f"RoPE factor={factor:g} is below 1", field="model")
    return factor
