"""What every call of the admin interface has in common: errors, and the rules of changes.

A call whose request carries ``options`` is a change. It is refused on a read-only socket and
without a deadline, checked against the revision, run once per ``request_id``, and finished even
if its caller goes away.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from sparsed.core import InputError
from sparsed.db.store import StoreError

Call = Callable[[], Awaitable[Message]]

ERROR_DOMAIN = "sparsed"
MAX_REMEMBERED_ANSWERS = 1024


class Refused(Exception):
    """A call that may not be made now; ``reason`` is a stable word for programs."""

    def __init__(self, message: str, *, code: int, reason: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """A change that runs or has succeeded, and the request it answers."""

    request: bytes
    task: asyncio.Task[Message]


class Changes:
    """Runs changes: one configuration change at a time, each ``request_id`` once. Those of knobs
    only begin one at a time: a newer one overtakes what the engine is still getting ready for.

    ``revision`` grows with every change of the configuration, and from one process to the next:
    it starts at the wall time in milliseconds.
    """

    def __init__(self) -> None:
        self.revision = time.time_ns() // 1_000_000
        self._lock = asyncio.Lock()
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()
        self._tasks: set[asyncio.Task[Message]] = set()

    async def run(self, method: str, request: Any, call: Call) -> Message:
        """The answer of ``call``. Refused: the revision, or a re-used ``request_id``."""
        content = request.SerializeToString(deterministic=True)
        key = (method, request.options.request_id)
        answer = self._answers.get(key)
        if answer is None:
            answer = _Answer(request=content, task=self._start(method, request, call))
            self._remember(key, answer)
        elif answer.request != content:
            raise Refused(
                f"request_id {key[1]!r} was used for another {method}; take a new one",
                code=code_pb2.INVALID_ARGUMENT,
                reason="REQUEST_ID_REUSED",
            )
        return await asyncio.shield(answer.task)

    async def close(self) -> None:
        """Give up the changes that still run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, method: str, request: Any, call: Call) -> asyncio.Task[Message]:
        # Lifecycle calls change no configuration, and a stop must overtake a drain.
        run = self._change
        if ".DaemonService/" in method:
            run = self._check_then_call
        elif ".KnobService/" in method:
            run = self._begin_change
        task = asyncio.create_task(run(request, call))
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[Message]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here: the caller may be gone

    async def _change(self, request: Any, call: Call) -> Message:
        async with self._lock:
            response = await self._check_then_call(request, call)
            if not request.options.validate_only:
                self.revision += 1
            return response

    async def _begin_change(self, request: Any, call: Call) -> Message:
        async with self._lock:
            self._check(request)
            begun = asyncio.ensure_future(call())
            await asyncio.sleep(0)  # a bad value is refused before anything is waited for
            is_refused = begun.done() and begun.exception() is not None
            if not (is_refused or request.options.validate_only):
                self.revision += 1
        return await begun

    async def _check_then_call(self, request: Any, call: Call) -> Message:
        self._check(request)
        return await call()

    def _check(self, request: Any) -> None:
        options = request.options
        if options.HasField("expected_revision") and options.expected_revision != self.revision:
            raise Refused(
                f"the configuration is at revision {self.revision}, not "
                f"{options.expected_revision}; read it again, then repeat",
                code=code_pb2.ABORTED,
                reason="REVISION_MISMATCH",
            )

    def _remember(self, key: tuple[str, str], answer: _Answer) -> None:
        if not key[1]:
            return
        self._answers[key] = answer
        answer.task.add_done_callback(lambda task: self._forget_failure(key, task))
        while len(self._answers) > MAX_REMEMBERED_ANSWERS:
            self._answers.popitem(last=False)

    def _forget_failure(self, key: tuple[str, str], task: asyncio.Task[Message]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._answers.pop(key, None)


class AdminInterceptor(grpc.aio.ServerInterceptor):
    """Applies the rules to every unary call of one server."""

    def __init__(self, changes: Changes, *, read_only: bool) -> None:
        self._changes = changes
        self._read_only = read_only

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/sparsed."):
            return handler
        behavior = handler.unary_unary or handler.unary_stream
        if not inspect.iscoroutinefunction(behavior):  # the generated base class: not there yet
            behavior = _unimplemented
        return _handler_maker(handler)(
            self._ruled(details.method, behavior),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _ruled(self, method: str, behavior: Any) -> Any:
        async def call(request: Message, context: Any) -> Message:
            try:
                if "options" not in request.DESCRIPTOR.fields_by_name:
                    answer: Message = await behavior(request, context)
                    return answer
                self._admit(context)
                return await self._changes.run(method, request, lambda: behavior(request, context))
            except InputError as error:
                await _abort(context, _input_status(error))
            except StoreError as error:
                await _abort(context, _store_failure(error))
            except Refused as error:
                await _abort(context, _refusal(error))

        return call

    def _admit(self, context: Any) -> None:
        if self._read_only:
            raise Refused(
                "this socket is read-only; changes go to admin.sock",
                code=code_pb2.PERMISSION_DENIED,
                reason="READ_ONLY_SOCKET",
            )
        if context.time_remaining() is None:
            raise Refused(
                "a change needs a deadline; set one on the call",
                code=code_pb2.INVALID_ARGUMENT,
                reason="DEADLINE_REQUIRED",
            )


def _handler_maker(handler: Any) -> Callable[..., Any]:
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler
    return grpc.unary_unary_rpc_method_handler


async def _unimplemented(request: Message, context: Any) -> NoReturn:
    raise Refused(
        "this call is not implemented in this version",
        code=code_pb2.UNIMPLEMENTED,
        reason="NOT_IMPLEMENTED",
    )


def _input_status(error: InputError) -> status_pb2.Status:
    if error.field is None:  # no value is wrong: the daemon is not in a state to take it
        info = error_details_pb2.ErrorInfo(reason="NOT_NOW", domain=ERROR_DOMAIN)
        return _status(code_pb2.FAILED_PRECONDITION, str(error), info)
    violation = error_details_pb2.BadRequest.FieldViolation(
        field=error.field, description=str(error)
    )
    details = error_details_pb2.BadRequest(field_violations=[violation])
    return _status(code_pb2.INVALID_ARGUMENT, str(error), details)


def _refusal(error: Refused) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    return _status(error.code, str(error), info)


def _store_failure(error: StoreError) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(reason="STORE_FAILED", domain=ERROR_DOMAIN)
    return _status(code_pb2.INTERNAL, str(error), info)


def _status(code: int, text: str, details: Message) -> status_pb2.Status:
    packed = AnyMessage()
    packed.Pack(details)
    return status_pb2.Status(code=code, message=text, details=[packed])


async def _abort(context: Any, status: status_pb2.Status) -> NoReturn:
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)
    raise AssertionError("abort returned")
