"""Every value survives the wire, and no message falls behind its dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsed import core
from sparsed.controller import control
from sparsed.controller.messages import from_enum, from_message, to_enum, to_message
from sparsed.controller.v1 import admin_pb2 as pb
from sparsed.core import (
    InputError,
    Knobs,
    Objective,
    Profile,
    ProfileStatus,
    TunerMode,
)
from sparsed.tuner.export import ExportFormat

SCALARS = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=5),
    bool: st.booleans(),
}
ENUMS = (
    control.DaemonState,
    control.KnobSource,
    core.KnobClass,
    core.Direction,
    core.CopyPath,
    core.WaitReason,
    core.RefusalReason,
    core.Bound,
    core.NvmlFault,
    core.PcieCounter,
    core.GpuSlowdown,
    core.DecisionState,
    TunerMode,
    ProfileStatus,
    Objective,
    ExportFormat,
)
ROOTS = (
    control.DaemonStatus,
    control.Explanation,
    control.KnobState,
    control.TunerState,
    Profile,
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is NoneType:
        return st.none()
    if origin in (Union, UnionType):
        return st.one_of(*(values_of(part) for part in parts))
    if origin is tuple:
        return st.lists(values_of(parts[0]), max_size=2).map(tuple)
    if origin is Mapping:
        return st.dictionaries(st.text(max_size=3), values_of(parts[1]), max_size=2)
    if hint is Knobs:
        return st.integers(256, 8192).map(knobs)
    if issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    if is_dataclass(hint):
        return st.builds(hint, **{n: values_of(h) for n, h in get_type_hints(hint).items()})
    return SCALARS[hint]


def knobs(token_budget: int) -> Knobs:
    return Knobs(
        token_budget=token_budget,
        hbm_budget=None,
        max_num_active_seqs=1,
        prefill_chunk=16,
        page_size=8,
        sparse_method="quest",
        dense_layers=1,
        max_num_seqs=2,
        kv_hbm_gib=0.5,
        kv_dram_gib=1.0,
        max_model_len=128,
    )


@pytest.mark.parametrize("kind", ROOTS)
def test_values_survive_the_wire(kind: type) -> None:
    @settings(max_examples=15)
    @given(values_of(kind))
    def check(value: Any) -> None:
        message_type = getattr(pb, kind.__name__)
        sent = to_message(value, message_type()).SerializeToString()
        assert from_message(message_type.FromString(sent), kind) == value

    check()


def reachable(kind: Any) -> set[Any]:
    found = {kind} if is_dataclass(kind) and kind is not Knobs else set()
    parts = get_type_hints(kind).values() if found else get_args(kind)
    return found.union(*(reachable(part) for part in parts))


def test_no_message_falls_behind_its_dataclass() -> None:
    for kind in set().union(*(reachable(root) for root in ROOTS)):
        message = pb.DESCRIPTOR.message_types_by_name[kind.__name__]
        names = [item.name for item in fields(kind)]
        assert sorted(names) == sorted(message.fields_by_name), kind


@pytest.mark.parametrize("kind", ENUMS)
def test_enums_have_the_same_members(kind: type[StrEnum]) -> None:
    assert [from_enum(to_enum(member), kind) for member in kind] == list(kind)
    assert len(pb.DESCRIPTOR.enum_types_by_name[kind.__name__].values) == len(kind) + 1
    for unknown in (0, 99):
        with pytest.raises(InputError):
            from_enum(unknown, kind)
