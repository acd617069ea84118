"""The daemon as its clients see it: calls on a unix socket, values in and out."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sparsed.controller.control import DaemonStatus, Explanation, KnobState, TunerState, TunerVerb
from sparsed.controller.messages import from_message, to_enum, to_knob_value
from sparsed.controller.v1 import admin_pb2 as pb
from sparsed.controller.v1 import admin_pb2_grpc as rpc
from sparsed.core import InputError, KnobValue, Profile, RecordingPart, Snapshot, TunerMode
from sparsed.tuner.export import ExportFormat

CALL_TIMEOUT_S = 30.0
KNOBS_TIMEOUT_S = 600.0  # a busy GPU may be minutes at getting ready
DRAIN_MARGIN_S = 30.0
LONGEST_DRAIN_S = 86400.0

_INPUT_CODES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 4 << 20))


class DaemonUnreachable(Exception):
    """Nobody listens on the socket, or it may not be opened; the message says what to do."""


class CallFailed(Exception):
    """The daemon refused the call or failed in it; the message is the daemon's."""


class AdminClient:
    """Blocking calls to the daemon behind ``socket``; reads work on both of its sockets.

    Errors of every call: DaemonUnreachable, CallFailed, and InputError for a value the daemon
    does not accept. Not for use by several threads.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_CHANNEL_OPTIONS)
        self._daemon = rpc.DaemonServiceStub(self._channel)
        self._tuning = rpc.TuningServiceStub(self._channel)
        self._knobs = rpc.KnobServiceStub(self._channel)
        self._profiles = rpc.ProfileServiceStub(self._channel)
        self._telemetry = rpc.TelemetryServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def status(self) -> DaemonStatus:
        answer = self._call(self._daemon.GetStatus, pb.GetStatusRequest())
        return from_message(answer.status, DaemonStatus)

    def snapshot(self) -> Snapshot | None:
        """The last closed window; None before the first."""
        answer = self._call(self._telemetry.Snapshot, pb.SnapshotRequest())
        return from_message(answer.snapshot, Snapshot) if answer.HasField("snapshot") else None

    def list_knobs(self) -> tuple[KnobState, ...]:
        return _knob_states(self._call(self._knobs.List, pb.ListKnobsRequest()))

    def set_knobs(
        self, values: Mapping[str, KnobValue], *, validate_only: bool, reason: str
    ) -> tuple[KnobState, ...]:
        request = pb.SetKnobsRequest(options=_options(validate_only, reason))
        for name, value in values.items():
            request.values[name].CopyFrom(to_knob_value(value))
        return _knob_states(self._call(self._knobs.Set, request, timeout_s=KNOBS_TIMEOUT_S))

    def reset_knobs(
        self, names: Iterable[str], *, validate_only: bool, reason: str
    ) -> tuple[KnobState, ...]:
        """Set ``names`` to the defaults of their specification."""
        request = pb.ResetKnobsRequest(options=_options(validate_only, reason), names=names)
        return _knob_states(self._call(self._knobs.Reset, request, timeout_s=KNOBS_TIMEOUT_S))

    def tuner(self, mode: TunerMode | None = None) -> TunerState:
        """The live tuner's state, after switching to ``mode`` if one is given."""
        if mode is None:
            answer = self._call(self._tuning.GetState, pb.GetStateRequest())
        else:
            number = to_enum(mode)
            request = pb.SetModeRequest(options=_options(False, ""), mode=number)
            answer = self._call(self._tuning.SetMode, request)
        return from_message(answer.state, TunerState)

    def explain(self) -> Explanation:
        """What binds now, what would help, and what was tried."""
        answer = self._call(self._tuning.Explain, pb.ExplainRequest())
        return from_message(answer.explanation, Explanation)

    def steer_tuner(self, verb: TunerVerb, *, knob: str = "", reason: str) -> TunerState:
        """Tell the live tuner something; ``knob`` is for pins."""
        options = _options(False, reason)
        method, request = {
            TunerVerb.REVIVE: (self._tuning.Start, pb.StartTuningRequest),
            TunerVerb.KILL: (self._tuning.Stop, pb.StopTuningRequest),
            TunerVerb.FREEZE: (self._tuning.Pause, pb.PauseRequest),
            TunerVerb.UNFREEZE: (self._tuning.Resume, pb.ResumeRequest),
            TunerVerb.APPROVE: (self._tuning.Approve, pb.ApproveRequest),
            TunerVerb.REJECT: (self._tuning.Reject, pb.RejectRequest),
            TunerVerb.PIN: (self._tuning.Pin, pb.PinRequest),
            TunerVerb.UNPIN: (self._tuning.Unpin, pb.UnpinRequest),
        }[verb]
        named = {"knob": knob} if knob else {}
        answer = self._call(method, request(options=options, **named))
        return from_message(answer.state, TunerState)

    def drain(self, *, timeout_s: float | None) -> int:
        """Returns when no request runs any more; how many were cut off by the timeout."""
        request = pb.DrainRequest(options=_options(False, ""), timeout_s=timeout_s)
        deadline_s = LONGEST_DRAIN_S if timeout_s is None else timeout_s + DRAIN_MARGIN_S
        answer = self._call(self._daemon.Drain, request, timeout_s=deadline_s)
        return int(answer.num_cut_off)

    def request_stop(self) -> None:
        """Begin an ordered shutdown (drain included); returns at once."""
        self._call(self._daemon.Stop, pb.StopRequest(options=_options(False, "")))

    def start_recording(self, *, duration_s: float | None, max_requests: int | None) -> int:
        """Have arriving requests noted; ends by itself if nothing is taken for a minute."""
        request = pb.StartRecordingRequest(
            options=_options(False, ""), duration_s=duration_s, max_requests=max_requests
        )
        return int(self._call(self._daemon.StartRecording, request).recording_id)

    def take_recording(self, recording_id: int, *, stop: bool) -> RecordingPart:
        """What has ended since the last call; each request comes once."""
        request = pb.TakeRecordingRequest(
            options=pb.MutationOptions(), recording_id=recording_id, stop=stop
        )
        answer = self._call(self._daemon.TakeRecording, request)
        return from_message(answer.part, RecordingPart)

    def list_profiles(self) -> tuple[Profile, ...]:
        answer = self._call(self._profiles.List, pb.ListProfilesRequest())
        return tuple(from_message(profile, Profile) for profile in answer.profiles)

    def get_profile(self, profile_id: int) -> Profile:
        answer = self._call(self._profiles.Get, pb.GetProfileRequest(profile_id=profile_id))
        return from_message(answer.profile, Profile)

    def import_profile(self, text: str, *, validate_only: bool, reason: str) -> Profile:
        request = pb.ImportProfileRequest(options=_options(validate_only, reason), text=text)
        return from_message(self._call(self._profiles.Import, request).profile, Profile)

    def export_profile(
        self,
        profile_id: int,
        *,
        format: ExportFormat,
        engine_version: str | None = None,
        force: bool = False,
    ) -> str:
        request = pb.ExportProfileRequest(
            profile_id=profile_id,
            format=to_enum(format),
            engine_version=engine_version,
            force=force,
        )
        return str(self._call(self._profiles.Export, request).text)

    def pin_profile(self, profile_id: int, *, validate_only: bool, reason: str) -> Profile:
        options = _options(validate_only, reason)
        request = pb.PinProfileRequest(options=options, profile_id=profile_id)
        return from_message(self._call(self._profiles.Pin, request).profile, Profile)

    def _call(self, method: Any, request: Any, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            self._raise(error)

    def _raise(self, error: Any) -> NoReturn:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise DaemonUnreachable(self._advice()) from None
        if error.code() in _INPUT_CODES:
            raise InputError(error.details(), field=_field(error)) from None
        raise CallFailed(error.details() or error.code().name) from None

    def _advice(self) -> str:
        directory = self._socket.parent
        is_hidden = directory.exists() and not os.access(directory, os.X_OK)
        if is_hidden or (self._socket.exists() and not os.access(self._socket, os.W_OK)):
            return f"{self._socket} may not be opened by this user; ask to join its group"
        return f"no daemon is listening at {self._socket}; start one with: sparsed start"


def _options(validate_only: bool, reason: str) -> pb.MutationOptions:
    return pb.MutationOptions(
        validate_only=validate_only, reason=reason, request_id=uuid.uuid4().hex
    )


def _knob_states(answer: Any) -> tuple[KnobState, ...]:
    return tuple(from_message(knob, KnobState) for knob in answer.knobs)


def _field(error: Any) -> str | None:
    """The field that the status details name."""
    status = rpc_status.from_call(error)
    bad_request = error_details_pb2.BadRequest()
    for detail in status.details if status else ():
        if detail.Unpack(bad_request):
            return bad_request.field_violations[0].field or None
    return None
