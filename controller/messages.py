"""Values of the vocabulary to messages of ``sparsed.admin.v1`` and back.

A message has the name and the field names of its dataclass, so one rule converts them all: a
None is an absent field, a tuple a repeated field, a mapping a map, an enum its ``CLASS_MEMBER``,
and a knob value (a union of scalars) the oneof ``KnobValue``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from sparsed.controller.v1 import admin_pb2 as pb
from sparsed.core import InputError, Knobs, KnobValue

Value = TypeVar("Value")
MessageT = TypeVar("MessageT", bound=Message)
EnumT = TypeVar("EnumT", bound=StrEnum)


def to_message(value: Any, message: MessageT) -> MessageT:
    """Fill ``message`` from the dataclass ``value`` and return it."""
    if isinstance(value, Knobs):
        return _fill_map(message, "values", value.as_dict())
    for name, hint in _hints(type(value)).items():
        item = getattr(value, name)
        if isinstance(item, Mapping):
            _fill_map(message, name, item)
        elif isinstance(item, tuple):
            getattr(message, name).extend(_encode(part, get_args(hint)[0]) for part in item)
        elif item is not None:
            _assign(message, name, _encode(item, hint))
    return message


def from_message(message: Message, kind: type[Value]) -> Value:
    """The dataclass of type ``kind`` that ``message`` stands for; InputError if it is invalid."""
    if kind is Knobs:
        return kind(**_read_map(message, "values", KnobValue))
    hints = _hints(kind)
    return kind(**{name: _read(message, name, hint) for name, hint in hints.items()})


def to_knob_value(value: KnobValue) -> pb.KnobValue:
    match value:
        case None:
            return pb.KnobValue()
        case int():
            return pb.KnobValue(integer=value)
        case float():
            return pb.KnobValue(number=value)
        case _:
            return pb.KnobValue(text=str(value))


def from_knob_value(message: pb.KnobValue) -> KnobValue:
    kind = message.WhichOneof("kind")
    value: KnobValue = getattr(message, kind) if kind else None
    return value


def to_enum(member: StrEnum) -> Any:
    """Number of ``member``; each generated enum has a type of its own, hence Any."""
    name = _prefix(type(member)) + member.name
    return _descriptor(type(member)).values_by_name[name].number


def from_enum(number: int, kind: type[EnumT]) -> EnumT:
    """InputError for the zero of the enum and for numbers this version does not know."""
    known = _descriptor(kind).values_by_number.get(number)
    if not number or known is None:
        choices = ", ".join(member.value for member in kind)
        raise InputError(f"{kind.__name__} is not given; one of {choices}", field=kind.__name__)
    return kind[known.name.removeprefix(_prefix(kind))]


def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind)}


def _prefix(kind: type[StrEnum]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).upper() + "_"


def _descriptor(kind: type[StrEnum]) -> EnumDescriptor:
    descriptor: EnumDescriptor = pb.DESCRIPTOR.enum_types_by_name[kind.__name__]
    return descriptor


def _scalar(hint: Any) -> Any:
    """``hint`` without None; the union itself where several scalars remain (a knob value)."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else KnobValue


def _encode(value: Any, hint: Any) -> Any:
    if _scalar(hint) is KnobValue:
        return to_knob_value(value)
    if isinstance(value, StrEnum):
        return to_enum(value)
    if is_dataclass(value):
        return to_message(value, getattr(pb, type(value).__name__)())
    return value


def _assign(message: Message, name: str, value: Any) -> None:
    if isinstance(value, Message):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


def _fill_map(message: MessageT, name: str, items: Mapping[str, Any]) -> MessageT:
    target = getattr(message, name)
    is_knobs = hasattr(target, "get_or_create")  # a map to messages
    for key, value in items.items():
        if is_knobs:
            target[key].CopyFrom(to_knob_value(value))
        else:
            target[key] = value
    return message


def _read_map(message: Message, name: str, hint: Any) -> dict[str, Any]:
    items = getattr(message, name).items()
    return {key: _decode(value, hint) for key, value in items}


def _read(message: Message, name: str, hint: Any) -> Any:
    origin = get_origin(hint)
    if origin is Mapping:
        return _read_map(message, name, get_args(hint)[1])
    if origin is tuple:
        element = get_args(hint)[0]
        return tuple(_decode(item, element) for item in getattr(message, name))
    descriptor = message.DESCRIPTOR.fields_by_name[name]
    if descriptor.has_presence and not message.HasField(name):
        return None
    return _decode(getattr(message, name), hint)


def _decode(value: Any, hint: Any) -> Any:
    if isinstance(value, pb.KnobValue):
        return from_knob_value(value)
    kind = _scalar(hint)
    if isinstance(value, Message):
        return from_message(value, kind)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return from_enum(value, kind)
    return value
