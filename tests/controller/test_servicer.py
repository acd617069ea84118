"""The rules of the wire: sockets, deadlines, repeats, revisions, health, and its stability."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

import sparsed.controller.v1
from sparsed.controller.control import DaemonState
from sparsed.controller.servicer import SERVICES, serve
from sparsed.controller.v1 import admin_pb2 as pb
from sparsed.controller.v1 import admin_pb2_grpc as rpc

GOLDEN = Path(__file__).parent / "golden" / "admin.txt"
IMPLEMENTED = {
    "DaemonService": {"GetStatus", "Drain", "Stop", "StartRecording", "TakeRecording"},
    "TuningService": {
        "GetState",
        "SetMode",
        "Explain",
        "Start",
        "Stop",
        "Pause",
        "Resume",
        "Approve",
        "Reject",
        "Pin",
        "Unpin",
    },
    "KnobService": {"List", "Set", "Reset"},
    "ProfileService": {"List", "Get", "Import", "Export", "Pin"},
    "TelemetryService": {"Snapshot"},
}
ALL_METHODS = [
    (service.name, method.name)
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.fixture
def channel(daemon: Any) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{daemon.place.admin_socket}") as channel:
        yield channel


@pytest.fixture
def knobs(channel: grpc.Channel) -> rpc.KnobServiceStub:
    return rpc.KnobServiceStub(channel)


def set_budget(tokens: int, **options: Any) -> pb.SetKnobsRequest:
    values = {"token_budget": pb.KnobValue(integer=tokens)}
    return pb.SetKnobsRequest(options=pb.MutationOptions(**options), values=values)


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def reason_of(error: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    (detail,) = rpc_status.from_call(error).details
    assert detail.Unpack(info)
    return str(info.reason)


def test_sockets_are_for_the_group_and_vanish_at_the_end(control: Any, place: Any) -> None:
    async def live() -> list[int]:
        place.admin_socket.touch()  # left by a crash
        servers = await serve(
            control, read_socket=place.read_socket, admin_socket=place.admin_socket
        )
        modes = [path.stat().st_mode & 0o777 for path in (place.read_socket, place.admin_socket)]
        await servers.stop()
        return modes

    umask = os.umask(0)
    try:
        assert asyncio.run(live()) == [0o660, 0o660]
    finally:
        os.umask(umask)
    assert not place.read_socket.exists() and not place.admin_socket.exists()


def test_a_change_without_deadline_is_refused(knobs: Any, control: Any) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        knobs.Set(set_budget(1024))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(raised.value) == "DEADLINE_REQUIRED"
    assert control.changes == []


def test_a_repeated_request_id_changes_once(knobs: Any, control: Any) -> None:
    request = set_budget(1024, request_id="a")
    first = knobs.Set(request, timeout=10)
    assert knobs.Set(request, timeout=10) == first
    assert len(control.changes) == 1
    with pytest.raises(grpc.RpcError) as raised:
        knobs.Set(set_budget(512, request_id="a"), timeout=10)
    assert reason_of(raised.value) == "REQUEST_ID_REUSED"


def test_a_failed_change_may_be_repeated(knobs: Any, control: Any) -> None:
    request = set_budget(8192, request_id="a")
    control.now = replace(control.now, knobs=control.now.knobs.with_values({"hbm_budget": 4096}))
    with pytest.raises(grpc.RpcError):
        knobs.Set(request, timeout=10)
    control.now = replace(control.now, knobs=control.now.knobs.with_values({"hbm_budget": None}))
    knobs.Set(request, timeout=10)
    assert control.now.knobs.token_budget == 8192


def test_of_two_changes_of_one_revision_one_is_aborted(knobs: Any, control: Any) -> None:
    revision = knobs.List(pb.ListKnobsRequest()).revision

    def attempt(tokens: int) -> str:
        try:
            knobs.Set(set_budget(tokens, expected_revision=revision), timeout=10)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.ABORTED
            return reason_of(error)
        return "OK"

    with ThreadPoolExecutor() as pool:
        assert sorted(pool.map(attempt, (512, 1024))) == ["OK", "REVISION_MISMATCH"]
    assert len(control.changes) == 1
    assert knobs.List(pb.ListKnobsRequest()).revision == revision + 1


def test_a_newer_change_of_knobs_overtakes_one_that_takes_long(knobs: Any, control: Any) -> None:
    revision = knobs.List(pb.ListKnobsRequest()).revision
    with ThreadPoolExecutor() as pool:
        control.step_s = 1.0
        slow = pool.submit(knobs.Set, set_budget(1024), timeout=10)
        assert wait_for(lambda: knobs.List(pb.ListKnobsRequest()).revision == revision + 1)
        control.step_s = 0.0
        knobs.Set(set_budget(512, expected_revision=revision + 1), timeout=10)
        assert not slow.done() and control.changes == [({"token_budget": 512}, "")]
        slow.result()
    assert knobs.List(pb.ListKnobsRequest()).revision == revision + 2


def test_a_refused_change_of_knobs_keeps_the_revision(knobs: Any, control: Any) -> None:
    revision = knobs.List(pb.ListKnobsRequest()).revision
    for budget in (7, 512):
        control.is_engine_away = budget == 512
        with pytest.raises(grpc.RpcError):
            knobs.Set(set_budget(budget), timeout=10)
    assert knobs.List(pb.ListKnobsRequest()).revision == revision


def test_validate_only_keeps_the_revision(knobs: Any) -> None:
    revision = knobs.List(pb.ListKnobsRequest()).revision
    knobs.Set(set_budget(1024, validate_only=True), timeout=10)
    assert knobs.List(pb.ListKnobsRequest()).revision == revision


def test_a_stop_overtakes_a_drain(channel: grpc.Channel, control: Any) -> None:
    daemon = rpc.DaemonServiceStub(channel)
    control.may_drain.clear()
    draining = daemon.Drain.future(pb.DrainRequest(), timeout=30)
    assert wait_for(lambda: control.now.state is DaemonState.DRAINING)
    daemon.Stop(pb.StopRequest(), timeout=10)
    assert control.stops == 1 and not draining.done()
    control.may_drain.set()
    assert draining.result().num_cut_off == 0


def test_a_change_outlives_its_caller(knobs: Any, control: Any) -> None:
    control.step_s = 0.5
    with pytest.raises(grpc.RpcError) as raised:
        knobs.Set(set_budget(1024), timeout=0.25)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert wait_for(lambda: control.now.knobs.token_budget == 1024)


def test_a_precondition_has_its_own_code(knobs: Any, control: Any) -> None:
    control.is_engine_away = True
    with pytest.raises(grpc.RpcError) as raised:
        knobs.Set(set_budget(1024), timeout=10)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(raised.value) == "NOT_NOW"


def test_bad_values_name_their_field(knobs: Any, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        knobs.Set(set_budget(1), timeout=10)
    details = error_details_pb2.BadRequest()
    assert rpc_status.from_call(raised.value).details[0].Unpack(details)
    assert details.field_violations[0].field == "token_budget"
    with pytest.raises(grpc.RpcError) as raised:
        rpc.TuningServiceStub(channel).SetMode(pb.SetModeRequest(), timeout=10)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("service", "method"), ALL_METHODS)
def test_every_call_answers(channel: grpc.Channel, service: str, method: str) -> None:
    descriptor = pb.DESCRIPTOR.services_by_name[service].methods_by_name[method]
    request = getattr(pb, descriptor.input_type.name)()
    call = getattr(getattr(rpc, f"{service}Stub")(channel), method)
    try:
        answer = call(request, timeout=10)
        list(answer) if descriptor.server_streaming else answer
        code = grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()
    if method in IMPLEMENTED.get(service, set()):
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
    else:
        assert code is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(("service", "method"), ALL_METHODS)
def test_the_read_socket_changes_nothing(service: str, method: str) -> None:
    descriptor = pb.DESCRIPTOR.services_by_name[service].methods_by_name[method]
    reads = r"Get|List|Snapshot|Watch|Export|Diff|Explain|Verify|CollectBundle"
    is_change = "options" in descriptor.input_type.fields_by_name
    assert is_change != bool(re.match(reads, method))


def test_health_follows_the_daemon(daemon: Any) -> None:
    with grpc.insecure_channel(f"unix:{daemon.place.read_socket}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def health(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return int(stub.Check(request, timeout=5).status)

        for state, expected in (
            (DaemonState.LOADING, health_pb2.HealthCheckResponse.NOT_SERVING),
            (DaemonState.DEGRADED, health_pb2.HealthCheckResponse.SERVING),
            (DaemonState.DRAINING, health_pb2.HealthCheckResponse.NOT_SERVING),
        ):
            daemon.control.now = replace(daemon.control.now, state=state)
            assert wait_for(lambda wanted=expected: health("") == wanted)
            assert {health(service) for service in ("", *SERVICES)} == {expected}


def test_reflection_is_on_the_admin_socket_only(daemon: Any) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    def names(socket: Path) -> set[str]:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
            return {service.name for service in answer.list_services_response.service}

    assert names(daemon.place.admin_socket) >= {*SERVICES, "grpc.health.v1.Health"}
    with pytest.raises(grpc.RpcError) as raised:
        names(daemon.place.read_socket)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def interface() -> set[str]:
    """Every name, number and type that a client may depend on."""
    lines = {
        f"rpc {service.name}.{method.name}({method.input_type.name}) -> {method.output_type.name}"
        + (" stream" if method.server_streaming else "")
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        lines |= {f"enum {enum.name}.{value.name} = {value.number}" for value in enum.values}
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        lines |= {field_line(message, field) for field in message.fields}
    return lines


def field_line(message: Descriptor, field: FieldDescriptor) -> str:
    kinds = {
        getattr(FieldDescriptor, name): name
        for name in dir(FieldDescriptor)
        if name.startswith("TYPE_")
    }
    of_type = field.message_type or field.enum_type
    kind = of_type.name if of_type else kinds[field.type].removeprefix("TYPE_").lower()
    many = "repeated " if field.is_repeated else ""
    return f"message {message.name}.{field.name} = {field.number} {many}{kind}"


def test_the_interface_only_grows() -> None:
    golden = set(GOLDEN.read_text().splitlines())
    assert not golden - interface(), "a client that uses these would break"
    assert not interface() - golden, f"new: add these lines to {GOLDEN.name}"


def test_the_stubs_were_made_from_the_proto() -> None:
    (folder,) = sparsed.controller.v1.__path__
    text = re.sub(r"//.*", "", (Path(folder) / "admin.proto").read_text())
    calls = set(re.findall(r"rpc (\w+)\((\w+)\) returns \((?:stream )?(\w+)\)", text))
    assert calls == {
        (method.name, method.input_type.name, method.output_type.name)
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    for name, body in re.findall(r"message (\w+) \{([^}]*(?:oneof[^}]*\}[^}]*)?)\}", text):
        numbers = {(field, int(number)) for field, number in re.findall(r"(\w+) = (\d+);", body)}
        message = pb.DESCRIPTOR.message_types_by_name[name]
        assert numbers == {(field.name, field.number) for field in message.fields}
    assert len(re.findall(r"^message ", text, re.MULTILINE)) == len(
        pb.DESCRIPTOR.message_types_by_name
    )


def test_every_enum_begins_with_unspecified() -> None:
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")
