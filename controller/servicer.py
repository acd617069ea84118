"""The admin interface on two unix sockets: one for reading, one for everything.

Who may connect is decided by the permissions of the sockets, the only identity that a local
gRPC call has.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sparsed.controller.control import Control, DaemonState, DaemonStatus, TunerVerb
from sparsed.controller.interceptor import AdminInterceptor, Changes
from sparsed.controller.messages import from_enum, from_knob_value, to_message
from sparsed.controller.profiles import StoredProfiles
from sparsed.controller.v1 import admin_pb2 as pb
from sparsed.controller.v1 import admin_pb2_grpc as rpc
from sparsed.core import KNOBS_BY_NAME, InputError, KnobValue, Profile, TunerMode, check_knob_values
from sparsed.tuner.export import ExportFormat

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
SOCKET_MODE = 0o660
MAX_MESSAGE_BYTES = 4 << 20
HEALTH_PERIOD_S = 0.25
STOP_GRACE_S = 1.0

_HEALTHY_STATES = (DaemonState.SERVING, DaemonState.DEGRADED)


class DaemonServicer(rpc.DaemonServiceServicer):
    def __init__(self, control: Control, changes: Changes) -> None:
        self._control = control
        self._changes = changes

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        status = to_message(self._control.status(), pb.DaemonStatus())
        return pb.GetStatusResponse(status=status, revision=self._changes.revision)

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        timeout_s = request.timeout_s if request.HasField("timeout_s") else None
        if timeout_s is not None and timeout_s < 0:
            raise InputError("timeout_s is negative; give seconds from 0 up", field="timeout_s")
        if request.options.validate_only:
            return pb.DrainResponse()
        return pb.DrainResponse(num_cut_off=await self._control.drain(timeout_s=timeout_s))

    async def Stop(self, request: pb.StopRequest, context: Any) -> pb.StopResponse:
        if not request.options.validate_only:
            self._control.request_stop()
        return pb.StopResponse()

    async def StartRecording(
        self, request: pb.StartRecordingRequest, context: Any
    ) -> pb.StartRecordingResponse:
        limits = {
            name: getattr(request, name) if request.HasField(name) else None
            for name in ("duration_s", "max_requests")
        }
        for name, limit in limits.items():
            if limit is not None and not limit > 0:
                raise InputError(f"{name} is {limit:g}; give more than 0", field=name)
        if request.options.validate_only:
            return pb.StartRecordingResponse()
        return pb.StartRecordingResponse(recording_id=self._control.recorder.start(**limits))

    async def TakeRecording(
        self, request: pb.TakeRecordingRequest, context: Any
    ) -> pb.TakeRecordingResponse:
        if request.options.validate_only:
            return pb.TakeRecordingResponse()
        part = self._control.recorder.take(request.recording_id, stop=request.stop)
        return pb.TakeRecordingResponse(part=to_message(part, pb.RecordingPart()))


class TuningServicer(rpc.TuningServiceServicer):
    def __init__(self, control: Control) -> None:
        self._control = control

    async def GetState(self, request: pb.GetStateRequest, context: Any) -> pb.GetStateResponse:
        return pb.GetStateResponse(state=to_message(self._control.tuner(), pb.TunerState()))

    async def SetMode(self, request: pb.SetModeRequest, context: Any) -> pb.SetModeResponse:
        mode = from_enum(request.mode, TunerMode)
        state = self._control.tuner(None if request.options.validate_only else mode)
        return pb.SetModeResponse(state=to_message(state, pb.TunerState()))

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        explanation = to_message(await self._control.explain(), pb.Explanation())
        return pb.ExplainResponse(explanation=explanation)

    async def Start(self, request: pb.StartTuningRequest, context: Any) -> pb.StartTuningResponse:
        return pb.StartTuningResponse(state=await self._steer(TunerVerb.REVIVE, request))

    async def Stop(self, request: pb.StopTuningRequest, context: Any) -> pb.StopTuningResponse:
        return pb.StopTuningResponse(state=await self._steer(TunerVerb.KILL, request))

    async def Pause(self, request: pb.PauseRequest, context: Any) -> pb.PauseResponse:
        return pb.PauseResponse(state=await self._steer(TunerVerb.FREEZE, request))

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> pb.ResumeResponse:
        return pb.ResumeResponse(state=await self._steer(TunerVerb.UNFREEZE, request))

    async def Approve(self, request: pb.ApproveRequest, context: Any) -> pb.ApproveResponse:
        return pb.ApproveResponse(state=await self._steer(TunerVerb.APPROVE, request))

    async def Reject(self, request: pb.RejectRequest, context: Any) -> pb.RejectResponse:
        return pb.RejectResponse(state=await self._steer(TunerVerb.REJECT, request))

    async def Pin(self, request: pb.PinRequest, context: Any) -> pb.PinResponse:
        state = await self._steer(TunerVerb.PIN, request, knob=request.knob)
        return pb.PinResponse(state=state)

    async def Unpin(self, request: pb.UnpinRequest, context: Any) -> pb.UnpinResponse:
        state = await self._steer(TunerVerb.UNPIN, request, knob=request.knob)
        return pb.UnpinResponse(state=state)

    async def _steer(self, verb: TunerVerb, request: Any, *, knob: str = "") -> pb.TunerState:
        state = await self._control.steer_tuner(verb, knob=knob, **_plain(request.options))
        return to_message(state, pb.TunerState())


class KnobServicer(rpc.KnobServiceServicer):
    def __init__(self, control: Control, changes: Changes) -> None:
        self._control = control
        self._changes = changes

    async def List(self, request: pb.ListKnobsRequest, context: Any) -> pb.ListKnobsResponse:
        knobs = [to_message(knob, pb.KnobState()) for knob in self._control.list_knobs()]
        return pb.ListKnobsResponse(knobs=knobs, revision=self._changes.revision)

    async def Set(self, request: pb.SetKnobsRequest, context: Any) -> pb.SetKnobsResponse:
        values = {name: from_knob_value(value) for name, value in request.values.items()}
        return pb.SetKnobsResponse(knobs=await self._apply(values, request.options))

    async def Reset(self, request: pb.ResetKnobsRequest, context: Any) -> pb.ResetKnobsResponse:
        values = {name: _default(name) for name in request.names}
        return pb.ResetKnobsResponse(knobs=await self._apply(values, request.options))

    async def _apply(
        self, values: Mapping[str, KnobValue], options: pb.MutationOptions
    ) -> list[pb.KnobState]:
        if not values:
            raise InputError("no knob is named; give at least one", field="values")
        knobs = await self._control.set_knobs(
            check_knob_values(values), validate_only=options.validate_only, reason=options.reason
        )
        return [to_message(knob, pb.KnobState()) for knob in knobs]


class ProfileServicer(rpc.ProfileServiceServicer):
    """The store may block for seconds, so its calls run in threads."""

    def __init__(self, control: Control) -> None:
        self._profiles = StoredProfiles(control.profiles)

    async def List(self, request: pb.ListProfilesRequest, context: Any) -> pb.ListProfilesResponse:
        profiles = await asyncio.to_thread(self._profiles.list_profiles)
        return pb.ListProfilesResponse(profiles=[_profile(item) for item in profiles])

    async def Get(self, request: pb.GetProfileRequest, context: Any) -> pb.GetProfileResponse:
        profile = await asyncio.to_thread(self._profiles.get_profile, request.profile_id)
        return pb.GetProfileResponse(profile=_profile(profile))

    async def Import(
        self, request: pb.ImportProfileRequest, context: Any
    ) -> pb.ImportProfileResponse:
        profile = await asyncio.to_thread(
            self._profiles.import_profile, request.text, **_plain(request.options)
        )
        return pb.ImportProfileResponse(profile=_profile(profile))

    async def Export(
        self, request: pb.ExportProfileRequest, context: Any
    ) -> pb.ExportProfileResponse:
        format = from_enum(request.format, ExportFormat)
        text = await asyncio.to_thread(
            self._profiles.export_profile,
            request.profile_id,
            format=format,
            engine_version=request.engine_version if request.HasField("engine_version") else None,
            force=request.force,
        )
        return pb.ExportProfileResponse(text=text)

    async def Pin(self, request: pb.PinProfileRequest, context: Any) -> pb.PinProfileResponse:
        profile = await asyncio.to_thread(
            self._profiles.pin_profile, request.profile_id, **_plain(request.options)
        )
        return pb.PinProfileResponse(profile=_profile(profile))


class TelemetryServicer(rpc.TelemetryServiceServicer):
    def __init__(self, control: Control) -> None:
        self._control = control

    async def Snapshot(self, request: pb.SnapshotRequest, context: Any) -> pb.SnapshotResponse:
        snapshot = self._control.status().snapshot
        if snapshot is None:
            return pb.SnapshotResponse()
        return pb.SnapshotResponse(snapshot=to_message(snapshot, pb.Snapshot()))


class AdminServers:
    """Both servers, and the task that lets their health follow the state of the daemon."""

    def __init__(self, control: Control) -> None:
        self._changes = Changes()
        self._health = health.aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []
        self._follower = asyncio.create_task(_follow(control.status, self._health))
        self._control = control

    async def open(self, socket: Path, *, read_only: bool) -> None:
        """Serve on ``socket``. OSError or RuntimeError if it cannot be bound."""
        server = grpc.aio.server(
            interceptors=[AdminInterceptor(self._changes, read_only=read_only)],
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)],
        )
        self._register(server)
        if not read_only:
            reflection.enable_server_reflection(
                (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
            )
        socket.unlink(missing_ok=True)  # left by a crash: the caller holds the lock
        with _umask(0o077):  # bound narrow, widened after: never the other way round
            server.add_insecure_port(f"unix:{socket}")
        socket.chmod(SOCKET_MODE)
        await server.start()
        self._servers.append(server)

    async def stop(self) -> None:
        """End the calls under way within a second, close and remove both sockets."""
        self._follower.cancel()
        with suppress(asyncio.CancelledError):
            await self._follower
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(*(server.stop(STOP_GRACE_S) for server in self._servers))
        await self._changes.close()

    def _register(self, server: grpc.aio.Server) -> None:
        control, changes = self._control, self._changes
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        rpc.add_DaemonServiceServicer_to_server(DaemonServicer(control, changes), server)
        rpc.add_TuningServiceServicer_to_server(TuningServicer(control), server)
        rpc.add_KnobServiceServicer_to_server(KnobServicer(control, changes), server)
        rpc.add_ProfileServiceServicer_to_server(ProfileServicer(control), server)
        rpc.add_StudyServiceServicer_to_server(rpc.StudyServiceServicer(), server)
        rpc.add_TelemetryServiceServicer_to_server(TelemetryServicer(control), server)
        rpc.add_AuditServiceServicer_to_server(rpc.AuditServiceServicer(), server)


async def serve(control: Control, *, read_socket: Path, admin_socket: Path) -> AdminServers:
    """Serve ``control`` on both sockets until ``stop``.

    The caller holds the lock of the state directory: a socket found in the way is a leftover.
    """
    servers = AdminServers(control)
    await servers.open(read_socket, read_only=True)
    await servers.open(admin_socket, read_only=False)
    return servers


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


async def _follow(status: Callable[[], DaemonStatus], servicer: health.aio.HealthServicer) -> None:
    last: int | None = None
    while True:
        healthy = status().state in _HEALTHY_STATES
        answer = health_pb2.HealthCheckResponse
        now = answer.SERVING if healthy else answer.NOT_SERVING
        if now != last:
            for service in ("", *SERVICES):
                await servicer.set(service, now)
            last = now
        await asyncio.sleep(HEALTH_PERIOD_S)


def _default(name: str) -> KnobValue:
    spec = KNOBS_BY_NAME.get(name)
    if spec is None:
        raise InputError(f"unknown knob {name!r}; see: sparsed knobs list", field=name)
    if spec.default is None and not spec.auto:
        raise InputError(
            f"{name} has no fixed default, it is taken from the machine at start; "
            "set a value, or restart without the setting",
            field=name,
        )
    return spec.default


def _profile(profile: Profile) -> pb.Profile:
    return to_message(profile, pb.Profile())


def _plain(options: pb.MutationOptions) -> dict[str, Any]:
    return {"validate_only": options.validate_only, "reason": options.reason}
