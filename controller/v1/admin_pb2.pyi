from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DaemonState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DAEMON_STATE_UNSPECIFIED: _ClassVar[DaemonState]
    DAEMON_STATE_LOADING: _ClassVar[DaemonState]
    DAEMON_STATE_SERVING: _ClassVar[DaemonState]
    DAEMON_STATE_DEGRADED: _ClassVar[DaemonState]
    DAEMON_STATE_RESTARTING: _ClassVar[DaemonState]
    DAEMON_STATE_DRAINING: _ClassVar[DaemonState]
    DAEMON_STATE_STOPPED: _ClassVar[DaemonState]

class KnobClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KNOB_CLASS_UNSPECIFIED: _ClassVar[KnobClass]
    KNOB_CLASS_HOT: _ClassVar[KnobClass]
    KNOB_CLASS_RESTART: _ClassVar[KnobClass]

class KnobSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KNOB_SOURCE_UNSPECIFIED: _ClassVar[KnobSource]
    KNOB_SOURCE_DEFAULT: _ClassVar[KnobSource]
    KNOB_SOURCE_MACHINE: _ClassVar[KnobSource]
    KNOB_SOURCE_PROFILE: _ClassVar[KnobSource]
    KNOB_SOURCE_FILE: _ClassVar[KnobSource]
    KNOB_SOURCE_ENVIRONMENT: _ClassVar[KnobSource]
    KNOB_SOURCE_FLAG: _ClassVar[KnobSource]
    KNOB_SOURCE_LIVE: _ClassVar[KnobSource]
    KNOB_SOURCE_TUNER: _ClassVar[KnobSource]

class Bound(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BOUND_UNSPECIFIED: _ClassVar[Bound]
    BOUND_HBM: _ClassVar[Bound]
    BOUND_LINK: _ClassVar[Bound]
    BOUND_COMPUTE: _ClassVar[Bound]
    BOUND_LATENCY: _ClassVar[Bound]
    BOUND_HOST: _ClassVar[Bound]
    BOUND_CAPACITY: _ClassVar[Bound]
    BOUND_IDLE: _ClassVar[Bound]
    BOUND_UNKNOWN: _ClassVar[Bound]

class DecisionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECISION_STATE_UNSPECIFIED: _ClassVar[DecisionState]
    DECISION_STATE_ACCEPTED: _ClassVar[DecisionState]
    DECISION_STATE_REJECTED: _ClassVar[DecisionState]
    DECISION_STATE_HELD: _ClassVar[DecisionState]

class WaitReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WAIT_REASON_UNSPECIFIED: _ClassVar[WaitReason]
    WAIT_REASON_ACTIVE_LIMIT: _ClassVar[WaitReason]
    WAIT_REASON_HOT_TIER: _ClassVar[WaitReason]
    WAIT_REASON_DRAM_TIER: _ClassVar[WaitReason]
    WAIT_REASON_LINK: _ClassVar[WaitReason]
    WAIT_REASON_TURN: _ClassVar[WaitReason]
    WAIT_REASON_PROMPTS: _ClassVar[WaitReason]
    WAIT_REASON_SPILLED: _ClassVar[WaitReason]

class RefusalReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_REASON_UNSPECIFIED: _ClassVar[RefusalReason]
    REFUSAL_REASON_INVALID: _ClassVar[RefusalReason]
    REFUSAL_REASON_TOO_LONG: _ClassVar[RefusalReason]
    REFUSAL_REASON_DRAM_TIER: _ClassVar[RefusalReason]
    REFUSAL_REASON_HOT_TIER: _ClassVar[RefusalReason]
    REFUSAL_REASON_QUEUE_FULL: _ClassVar[RefusalReason]
    REFUSAL_REASON_DRAINING: _ClassVar[RefusalReason]

class TunerMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TUNER_MODE_UNSPECIFIED: _ClassVar[TunerMode]
    TUNER_MODE_OFF: _ClassVar[TunerMode]
    TUNER_MODE_OBSERVE: _ClassVar[TunerMode]
    TUNER_MODE_ADVISE: _ClassVar[TunerMode]
    TUNER_MODE_AUTO: _ClassVar[TunerMode]

class ProfileStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROFILE_STATUS_UNSPECIFIED: _ClassVar[ProfileStatus]
    PROFILE_STATUS_DRAFT: _ClassVar[ProfileStatus]
    PROFILE_STATUS_VERIFIED: _ClassVar[ProfileStatus]
    PROFILE_STATUS_STALE: _ClassVar[ProfileStatus]

class Objective(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OBJECTIVE_UNSPECIFIED: _ClassVar[Objective]
    OBJECTIVE_THROUGHPUT: _ClassVar[Objective]
    OBJECTIVE_GOODPUT: _ClassVar[Objective]
    OBJECTIVE_LATENCY: _ClassVar[Objective]
    OBJECTIVE_BALANCED: _ClassVar[Objective]
    OBJECTIVE_CAPACITY: _ClassVar[Objective]

class ExportFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPORT_FORMAT_UNSPECIFIED: _ClassVar[ExportFormat]
    EXPORT_FORMAT_TOML: _ClassVar[ExportFormat]
    EXPORT_FORMAT_JSON: _ClassVar[ExportFormat]
    EXPORT_FORMAT_VLLM: _ClassVar[ExportFormat]
    EXPORT_FORMAT_VLLM_YAML: _ClassVar[ExportFormat]
    EXPORT_FORMAT_SGLANG: _ClassVar[ExportFormat]
    EXPORT_FORMAT_TRTLLM: _ClassVar[ExportFormat]
    EXPORT_FORMAT_ENV: _ClassVar[ExportFormat]
    EXPORT_FORMAT_CLI: _ClassVar[ExportFormat]
    EXPORT_FORMAT_MARKDOWN: _ClassVar[ExportFormat]

class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECTION_UNSPECIFIED: _ClassVar[Direction]
    DIRECTION_H2D: _ClassVar[Direction]
    DIRECTION_D2H: _ClassVar[Direction]

class CopyPath(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COPY_PATH_UNSPECIFIED: _ClassVar[CopyPath]
    COPY_PATH_KERNEL: _ClassVar[CopyPath]
    COPY_PATH_COPY_ENGINE: _ClassVar[CopyPath]
    COPY_PATH_BATCHED: _ClassVar[CopyPath]
    COPY_PATH_STAGED: _ClassVar[CopyPath]
    COPY_PATH_MEMCPY: _ClassVar[CopyPath]

class NvmlFault(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NVML_FAULT_UNSPECIFIED: _ClassVar[NvmlFault]
    NVML_FAULT_NOT_SUPPORTED: _ClassVar[NvmlFault]
    NVML_FAULT_NO_PERMISSION: _ClassVar[NvmlFault]
    NVML_FAULT_NO_FUNCTION: _ClassVar[NvmlFault]
    NVML_FAULT_GPU_LOST: _ClassVar[NvmlFault]
    NVML_FAULT_FAILED: _ClassVar[NvmlFault]

class PcieCounter(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PCIE_COUNTER_UNSPECIFIED: _ClassVar[PcieCounter]
    PCIE_COUNTER_GPM: _ClassVar[PcieCounter]
    PCIE_COUNTER_FIELDS: _ClassVar[PcieCounter]
    PCIE_COUNTER_THROUGHPUT: _ClassVar[PcieCounter]

class GpuSlowdown(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GPU_SLOWDOWN_UNSPECIFIED: _ClassVar[GpuSlowdown]
    GPU_SLOWDOWN_THERMAL: _ClassVar[GpuSlowdown]
    GPU_SLOWDOWN_POWER_BRAKE: _ClassVar[GpuSlowdown]
    GPU_SLOWDOWN_HARDWARE: _ClassVar[GpuSlowdown]

class RolloutState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLLOUT_STATE_UNSPECIFIED: _ClassVar[RolloutState]
    ROLLOUT_STATE_ACTIVE: _ClassVar[RolloutState]
    ROLLOUT_STATE_VERIFYING: _ClassVar[RolloutState]
    ROLLOUT_STATE_SUCCESS: _ClassVar[RolloutState]
    ROLLOUT_STATE_REVERTED: _ClassVar[RolloutState]
    ROLLOUT_STATE_EXPIRED: _ClassVar[RolloutState]

class RolloutReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLLOUT_REASON_UNSPECIFIED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_PROPOSED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_CANARY: _ClassVar[RolloutReason]
    ROLLOUT_REASON_COMMITTED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_PROBATION_PASSED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_CRASHED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_ENGINE_DIED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_OUT_OF_MEMORY: _ClassVar[RolloutReason]
    ROLLOUT_REASON_SLO_BREACH: _ClassVar[RolloutReason]
    ROLLOUT_REASON_ERRORS: _ClassVar[RolloutReason]
    ROLLOUT_REASON_QUEUE_GROWTH: _ClassVar[RolloutReason]
    ROLLOUT_REASON_HBM_OVER_LIMIT: _ClassVar[RolloutReason]
    ROLLOUT_REASON_NOT_BETTER: _ClassVar[RolloutReason]
    ROLLOUT_REASON_REGRESSED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_APPLY_FAILED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_UNDECIDED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_NO_TRAFFIC: _ClassVar[RolloutReason]
    ROLLOUT_REASON_STALE_DATA: _ClassVar[RolloutReason]
    ROLLOUT_REASON_BUDGET_SPENT: _ClassVar[RolloutReason]
    ROLLOUT_REASON_OVERTAKEN: _ClassVar[RolloutReason]
    ROLLOUT_REASON_REJECTED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_PINNED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_FROZEN: _ClassVar[RolloutReason]
    ROLLOUT_REASON_KILLED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_SWITCHED_OFF: _ClassVar[RolloutReason]
    ROLLOUT_REASON_STORE_FAILED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_SHUT_DOWN: _ClassVar[RolloutReason]
    ROLLOUT_REASON_WAITED_TOO_LONG: _ClassVar[RolloutReason]
    ROLLOUT_REASON_REGIME_SWITCHED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_REGIME_CHANGED: _ClassVar[RolloutReason]
    ROLLOUT_REASON_PLATFORM_DRIFT: _ClassVar[RolloutReason]
DAEMON_STATE_UNSPECIFIED: DaemonState
DAEMON_STATE_LOADING: DaemonState
DAEMON_STATE_SERVING: DaemonState
DAEMON_STATE_DEGRADED: DaemonState
DAEMON_STATE_RESTARTING: DaemonState
DAEMON_STATE_DRAINING: DaemonState
DAEMON_STATE_STOPPED: DaemonState
KNOB_CLASS_UNSPECIFIED: KnobClass
KNOB_CLASS_HOT: KnobClass
KNOB_CLASS_RESTART: KnobClass
KNOB_SOURCE_UNSPECIFIED: KnobSource
KNOB_SOURCE_DEFAULT: KnobSource
KNOB_SOURCE_MACHINE: KnobSource
KNOB_SOURCE_PROFILE: KnobSource
KNOB_SOURCE_FILE: KnobSource
KNOB_SOURCE_ENVIRONMENT: KnobSource
KNOB_SOURCE_FLAG: KnobSource
KNOB_SOURCE_LIVE: KnobSource
KNOB_SOURCE_TUNER: KnobSource
BOUND_UNSPECIFIED: Bound
BOUND_HBM: Bound
BOUND_LINK: Bound
BOUND_COMPUTE: Bound
BOUND_LATENCY: Bound
BOUND_HOST: Bound
BOUND_CAPACITY: Bound
BOUND_IDLE: Bound
BOUND_UNKNOWN: Bound
DECISION_STATE_UNSPECIFIED: DecisionState
DECISION_STATE_ACCEPTED: DecisionState
DECISION_STATE_REJECTED: DecisionState
DECISION_STATE_HELD: DecisionState
WAIT_REASON_UNSPECIFIED: WaitReason
WAIT_REASON_ACTIVE_LIMIT: WaitReason
WAIT_REASON_HOT_TIER: WaitReason
WAIT_REASON_DRAM_TIER: WaitReason
WAIT_REASON_LINK: WaitReason
WAIT_REASON_TURN: WaitReason
WAIT_REASON_PROMPTS: WaitReason
WAIT_REASON_SPILLED: WaitReason
REFUSAL_REASON_UNSPECIFIED: RefusalReason
REFUSAL_REASON_INVALID: RefusalReason
REFUSAL_REASON_TOO_LONG: RefusalReason
REFUSAL_REASON_DRAM_TIER: RefusalReason
REFUSAL_REASON_HOT_TIER: RefusalReason
REFUSAL_REASON_QUEUE_FULL: RefusalReason
REFUSAL_REASON_DRAINING: RefusalReason
TUNER_MODE_UNSPECIFIED: TunerMode
TUNER_MODE_OFF: TunerMode
TUNER_MODE_OBSERVE: TunerMode
TUNER_MODE_ADVISE: TunerMode
TUNER_MODE_AUTO: TunerMode
PROFILE_STATUS_UNSPECIFIED: ProfileStatus
PROFILE_STATUS_DRAFT: ProfileStatus
PROFILE_STATUS_VERIFIED: ProfileStatus
PROFILE_STATUS_STALE: ProfileStatus
OBJECTIVE_UNSPECIFIED: Objective
OBJECTIVE_THROUGHPUT: Objective
OBJECTIVE_GOODPUT: Objective
OBJECTIVE_LATENCY: Objective
OBJECTIVE_BALANCED: Objective
OBJECTIVE_CAPACITY: Objective
EXPORT_FORMAT_UNSPECIFIED: ExportFormat
EXPORT_FORMAT_TOML: ExportFormat
EXPORT_FORMAT_JSON: ExportFormat
EXPORT_FORMAT_VLLM: ExportFormat
EXPORT_FORMAT_VLLM_YAML: ExportFormat
EXPORT_FORMAT_SGLANG: ExportFormat
EXPORT_FORMAT_TRTLLM: ExportFormat
EXPORT_FORMAT_ENV: ExportFormat
EXPORT_FORMAT_CLI: ExportFormat
EXPORT_FORMAT_MARKDOWN: ExportFormat
DIRECTION_UNSPECIFIED: Direction
DIRECTION_H2D: Direction
DIRECTION_D2H: Direction
COPY_PATH_UNSPECIFIED: CopyPath
COPY_PATH_KERNEL: CopyPath
COPY_PATH_COPY_ENGINE: CopyPath
COPY_PATH_BATCHED: CopyPath
COPY_PATH_STAGED: CopyPath
COPY_PATH_MEMCPY: CopyPath
NVML_FAULT_UNSPECIFIED: NvmlFault
NVML_FAULT_NOT_SUPPORTED: NvmlFault
NVML_FAULT_NO_PERMISSION: NvmlFault
NVML_FAULT_NO_FUNCTION: NvmlFault
NVML_FAULT_GPU_LOST: NvmlFault
NVML_FAULT_FAILED: NvmlFault
PCIE_COUNTER_UNSPECIFIED: PcieCounter
PCIE_COUNTER_GPM: PcieCounter
PCIE_COUNTER_FIELDS: PcieCounter
PCIE_COUNTER_THROUGHPUT: PcieCounter
GPU_SLOWDOWN_UNSPECIFIED: GpuSlowdown
GPU_SLOWDOWN_THERMAL: GpuSlowdown
GPU_SLOWDOWN_POWER_BRAKE: GpuSlowdown
GPU_SLOWDOWN_HARDWARE: GpuSlowdown
ROLLOUT_STATE_UNSPECIFIED: RolloutState
ROLLOUT_STATE_ACTIVE: RolloutState
ROLLOUT_STATE_VERIFYING: RolloutState
ROLLOUT_STATE_SUCCESS: RolloutState
ROLLOUT_STATE_REVERTED: RolloutState
ROLLOUT_STATE_EXPIRED: RolloutState
ROLLOUT_REASON_UNSPECIFIED: RolloutReason
ROLLOUT_REASON_PROPOSED: RolloutReason
ROLLOUT_REASON_CANARY: RolloutReason
ROLLOUT_REASON_COMMITTED: RolloutReason
ROLLOUT_REASON_PROBATION_PASSED: RolloutReason
ROLLOUT_REASON_CRASHED: RolloutReason
ROLLOUT_REASON_ENGINE_DIED: RolloutReason
ROLLOUT_REASON_OUT_OF_MEMORY: RolloutReason
ROLLOUT_REASON_SLO_BREACH: RolloutReason
ROLLOUT_REASON_ERRORS: RolloutReason
ROLLOUT_REASON_QUEUE_GROWTH: RolloutReason
ROLLOUT_REASON_HBM_OVER_LIMIT: RolloutReason
ROLLOUT_REASON_NOT_BETTER: RolloutReason
ROLLOUT_REASON_REGRESSED: RolloutReason
ROLLOUT_REASON_APPLY_FAILED: RolloutReason
ROLLOUT_REASON_UNDECIDED: RolloutReason
ROLLOUT_REASON_NO_TRAFFIC: RolloutReason
ROLLOUT_REASON_STALE_DATA: RolloutReason
ROLLOUT_REASON_BUDGET_SPENT: RolloutReason
ROLLOUT_REASON_OVERTAKEN: RolloutReason
ROLLOUT_REASON_REJECTED: RolloutReason
ROLLOUT_REASON_PINNED: RolloutReason
ROLLOUT_REASON_FROZEN: RolloutReason
ROLLOUT_REASON_KILLED: RolloutReason
ROLLOUT_REASON_SWITCHED_OFF: RolloutReason
ROLLOUT_REASON_STORE_FAILED: RolloutReason
ROLLOUT_REASON_SHUT_DOWN: RolloutReason
ROLLOUT_REASON_WAITED_TOO_LONG: RolloutReason
ROLLOUT_REASON_REGIME_SWITCHED: RolloutReason
ROLLOUT_REASON_REGIME_CHANGED: RolloutReason
ROLLOUT_REASON_PLATFORM_DRIFT: RolloutReason

class MutationOptions(_message.Message):
    __slots__ = ("validate_only", "reason", "request_id", "expected_revision")
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_REVISION_FIELD_NUMBER: _ClassVar[int]
    validate_only: bool
    reason: str
    request_id: str
    expected_revision: int
    def __init__(self, validate_only: bool = ..., reason: _Optional[str] = ..., request_id: _Optional[str] = ..., expected_revision: _Optional[int] = ...) -> None: ...

class KnobValue(_message.Message):
    __slots__ = ("integer", "number", "text")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    integer: int
    number: float
    text: str
    def __init__(self, integer: _Optional[int] = ..., number: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class KnobSpec(_message.Message):
    __slots__ = ("name", "unit", "klass", "help", "default", "minimum", "maximum", "choices", "auto", "integer")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    KLASS_FIELD_NUMBER: _ClassVar[int]
    HELP_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    AUTO_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    name: str
    unit: str
    klass: KnobClass
    help: str
    default: KnobValue
    minimum: float
    maximum: float
    choices: _containers.RepeatedCompositeFieldContainer[KnobValue]
    auto: bool
    integer: bool
    def __init__(self, name: _Optional[str] = ..., unit: _Optional[str] = ..., klass: _Optional[_Union[KnobClass, str]] = ..., help: _Optional[str] = ..., default: _Optional[_Union[KnobValue, _Mapping]] = ..., minimum: _Optional[float] = ..., maximum: _Optional[float] = ..., choices: _Optional[_Iterable[_Union[KnobValue, _Mapping]]] = ..., auto: bool = ..., integer: bool = ...) -> None: ...

class KnobState(_message.Message):
    __slots__ = ("spec", "value", "source", "pending")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    spec: KnobSpec
    value: KnobValue
    source: KnobSource
    pending: KnobValue
    def __init__(self, spec: _Optional[_Union[KnobSpec, _Mapping]] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ..., source: _Optional[_Union[KnobSource, str]] = ..., pending: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...

class Knobs(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KnobValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.MessageMap[str, KnobValue]
    def __init__(self, values: _Optional[_Mapping[str, KnobValue]] = ...) -> None: ...

class MemoryPlan(_message.Message):
    __slots__ = ("weights_bytes", "hot_pages_bytes", "summaries_bytes", "tables_bytes", "staging_bytes", "prefill_buffer_bytes", "dram_pool_bytes", "num_blocks", "num_frames")
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOT_PAGES_BYTES_FIELD_NUMBER: _ClassVar[int]
    SUMMARIES_BYTES_FIELD_NUMBER: _ClassVar[int]
    TABLES_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BUFFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAM_POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    weights_bytes: int
    hot_pages_bytes: int
    summaries_bytes: int
    tables_bytes: int
    staging_bytes: int
    prefill_buffer_bytes: int
    dram_pool_bytes: int
    num_blocks: int
    num_frames: int
    def __init__(self, weights_bytes: _Optional[int] = ..., hot_pages_bytes: _Optional[int] = ..., summaries_bytes: _Optional[int] = ..., tables_bytes: _Optional[int] = ..., staging_bytes: _Optional[int] = ..., prefill_buffer_bytes: _Optional[int] = ..., dram_pool_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_frames: _Optional[int] = ...) -> None: ...

class LinkProbe(_message.Message):
    __slots__ = ("h2d_bytes_per_s", "d2h_bytes_per_s")
    H2D_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    D2H_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    def __init__(self, h2d_bytes_per_s: _Optional[float] = ..., d2h_bytes_per_s: _Optional[float] = ...) -> None: ...

class LinkKey(_message.Message):
    __slots__ = ("gpu_name", "driver", "link", "torch", "triton")
    GPU_NAME_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    TORCH_FIELD_NUMBER: _ClassVar[int]
    TRITON_FIELD_NUMBER: _ClassVar[int]
    gpu_name: str
    driver: str
    link: str
    torch: str
    triton: str
    def __init__(self, gpu_name: _Optional[str] = ..., driver: _Optional[str] = ..., link: _Optional[str] = ..., torch: _Optional[str] = ..., triton: _Optional[str] = ...) -> None: ...

class LinkEntry(_message.Message):
    __slots__ = ("direction", "piece_bytes", "path", "programs", "tile_bytes", "bytes_per_s", "slowdown")
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    PIECE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    TILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SLOWDOWN_FIELD_NUMBER: _ClassVar[int]
    direction: Direction
    piece_bytes: int
    path: CopyPath
    programs: int
    tile_bytes: int
    bytes_per_s: float
    slowdown: float
    def __init__(self, direction: _Optional[_Union[Direction, str]] = ..., piece_bytes: _Optional[int] = ..., path: _Optional[_Union[CopyPath, str]] = ..., programs: _Optional[int] = ..., tile_bytes: _Optional[int] = ..., bytes_per_s: _Optional[float] = ..., slowdown: _Optional[float] = ...) -> None: ...

class LinkCalibration(_message.Message):
    __slots__ = ("key", "contiguous", "entries", "measured_at")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CONTIGUOUS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MEASURED_AT_FIELD_NUMBER: _ClassVar[int]
    key: LinkKey
    contiguous: LinkProbe
    entries: _containers.RepeatedCompositeFieldContainer[LinkEntry]
    measured_at: float
    def __init__(self, key: _Optional[_Union[LinkKey, _Mapping]] = ..., contiguous: _Optional[_Union[LinkProbe, _Mapping]] = ..., entries: _Optional[_Iterable[_Union[LinkEntry, _Mapping]]] = ..., measured_at: _Optional[float] = ...) -> None: ...

class EngineFacts(_message.Message):
    __slots__ = ("pid", "device_name", "weights_bytes", "load_s", "link", "versions", "copies", "calibration", "selection_trace")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    SELECTION_TRACE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    device_name: str
    weights_bytes: int
    load_s: float
    link: LinkProbe
    versions: _containers.ScalarMap[str, str]
    copies: _containers.RepeatedCompositeFieldContainer[LinkEntry]
    calibration: LinkCalibration
    selection_trace: str
    def __init__(self, pid: _Optional[int] = ..., device_name: _Optional[str] = ..., weights_bytes: _Optional[int] = ..., load_s: _Optional[float] = ..., link: _Optional[_Union[LinkProbe, _Mapping]] = ..., versions: _Optional[_Mapping[str, str]] = ..., copies: _Optional[_Iterable[_Union[LinkEntry, _Mapping]]] = ..., calibration: _Optional[_Union[LinkCalibration, _Mapping]] = ..., selection_trace: _Optional[str] = ...) -> None: ...

class CopyTotal(_message.Message):
    __slots__ = ("direction", "path", "num_bytes", "seconds")
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    direction: Direction
    path: CopyPath
    num_bytes: int
    seconds: float
    def __init__(self, direction: _Optional[_Union[Direction, str]] = ..., path: _Optional[_Union[CopyPath, str]] = ..., num_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class EngineStats(_message.Message):
    __slots__ = ("steps", "step_s", "prompt_tokens", "generated_tokens", "requests_finished", "hot_hits", "hot_misses", "evicted_pages", "overflow_pages", "h2d_bytes", "h2d_s", "d2h_bytes", "d2h_s", "recall_sum", "recall_samples", "num_running", "num_waiting", "hot_used_bytes", "hot_total_bytes", "dram_used_bytes", "dram_total_bytes", "recent_step_s", "knobs", "verify_checked_pages", "verify_mismatches", "copies", "working_set_pages", "working_set_bytes", "metadata_bytes", "foreseen_pages", "spills", "restores", "quality_raises", "quality_dense", "waits", "refusals", "num_spilled", "waiting", "recent_quality", "wasted_pages", "exposed_s", "timed_steps", "applying", "hbm_peak_bytes")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    HOT_HITS_FIELD_NUMBER: _ClassVar[int]
    HOT_MISSES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_PAGES_FIELD_NUMBER: _ClassVar[int]
    H2D_BYTES_FIELD_NUMBER: _ClassVar[int]
    H2D_S_FIELD_NUMBER: _ClassVar[int]
    D2H_BYTES_FIELD_NUMBER: _ClassVar[int]
    D2H_S_FIELD_NUMBER: _ClassVar[int]
    RECALL_SUM_FIELD_NUMBER: _ClassVar[int]
    RECALL_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    HOT_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOT_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAM_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAM_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECENT_STEP_S_FIELD_NUMBER: _ClassVar[int]
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_CHECKED_PAGES_FIELD_NUMBER: _ClassVar[int]
    VERIFY_MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    WORKING_SET_PAGES_FIELD_NUMBER: _ClassVar[int]
    WORKING_SET_BYTES_FIELD_NUMBER: _ClassVar[int]
    METADATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORESEEN_PAGES_FIELD_NUMBER: _ClassVar[int]
    SPILLS_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    QUALITY_RAISES_FIELD_NUMBER: _ClassVar[int]
    QUALITY_DENSE_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    NUM_SPILLED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RECENT_QUALITY_FIELD_NUMBER: _ClassVar[int]
    WASTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    TIMED_STEPS_FIELD_NUMBER: _ClassVar[int]
    APPLYING_FIELD_NUMBER: _ClassVar[int]
    HBM_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    steps: int
    step_s: float
    prompt_tokens: int
    generated_tokens: int
    requests_finished: int
    hot_hits: int
    hot_misses: int
    evicted_pages: int
    overflow_pages: int
    h2d_bytes: int
    h2d_s: float
    d2h_bytes: int
    d2h_s: float
    recall_sum: float
    recall_samples: int
    num_running: int
    num_waiting: int
    hot_used_bytes: int
    hot_total_bytes: int
    dram_used_bytes: int
    dram_total_bytes: int
    recent_step_s: _containers.RepeatedScalarFieldContainer[float]
    knobs: Knobs
    verify_checked_pages: int
    verify_mismatches: int
    copies: _containers.RepeatedCompositeFieldContainer[CopyTotal]
    working_set_pages: int
    working_set_bytes: int
    metadata_bytes: int
    foreseen_pages: int
    spills: int
    restores: int
    quality_raises: int
    quality_dense: int
    waits: _containers.RepeatedCompositeFieldContainer[WaitCount]
    refusals: _containers.RepeatedCompositeFieldContainer[RefusalCount]
    num_spilled: int
    waiting: _containers.RepeatedCompositeFieldContainer[WaitingRequest]
    recent_quality: _containers.RepeatedCompositeFieldContainer[QualityEvent]
    wasted_pages: int
    exposed_s: float
    timed_steps: int
    applying: KnobProgress
    hbm_peak_bytes: int
    def __init__(self, steps: _Optional[int] = ..., step_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., requests_finished: _Optional[int] = ..., hot_hits: _Optional[int] = ..., hot_misses: _Optional[int] = ..., evicted_pages: _Optional[int] = ..., overflow_pages: _Optional[int] = ..., h2d_bytes: _Optional[int] = ..., h2d_s: _Optional[float] = ..., d2h_bytes: _Optional[int] = ..., d2h_s: _Optional[float] = ..., recall_sum: _Optional[float] = ..., recall_samples: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., hot_used_bytes: _Optional[int] = ..., hot_total_bytes: _Optional[int] = ..., dram_used_bytes: _Optional[int] = ..., dram_total_bytes: _Optional[int] = ..., recent_step_s: _Optional[_Iterable[float]] = ..., knobs: _Optional[_Union[Knobs, _Mapping]] = ..., verify_checked_pages: _Optional[int] = ..., verify_mismatches: _Optional[int] = ..., copies: _Optional[_Iterable[_Union[CopyTotal, _Mapping]]] = ..., working_set_pages: _Optional[int] = ..., working_set_bytes: _Optional[int] = ..., metadata_bytes: _Optional[int] = ..., foreseen_pages: _Optional[int] = ..., spills: _Optional[int] = ..., restores: _Optional[int] = ..., quality_raises: _Optional[int] = ..., quality_dense: _Optional[int] = ..., waits: _Optional[_Iterable[_Union[WaitCount, _Mapping]]] = ..., refusals: _Optional[_Iterable[_Union[RefusalCount, _Mapping]]] = ..., num_spilled: _Optional[int] = ..., waiting: _Optional[_Iterable[_Union[WaitingRequest, _Mapping]]] = ..., recent_quality: _Optional[_Iterable[_Union[QualityEvent, _Mapping]]] = ..., wasted_pages: _Optional[int] = ..., exposed_s: _Optional[float] = ..., timed_steps: _Optional[int] = ..., applying: _Optional[_Union[KnobProgress, _Mapping]] = ..., hbm_peak_bytes: _Optional[int] = ...) -> None: ...

class WaitCount(_message.Message):
    __slots__ = ("reason", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: WaitReason
    count: int
    def __init__(self, reason: _Optional[_Union[WaitReason, str]] = ..., count: _Optional[int] = ...) -> None: ...

class RefusalCount(_message.Message):
    __slots__ = ("reason", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: RefusalReason
    count: int
    def __init__(self, reason: _Optional[_Union[RefusalReason, str]] = ..., count: _Optional[int] = ...) -> None: ...

class WaitingRequest(_message.Message):
    __slots__ = ("request_id", "reason", "waited_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: WaitReason
    waited_s: float
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[_Union[WaitReason, str]] = ..., waited_s: _Optional[float] = ...) -> None: ...

class QualityEvent(_message.Message):
    __slots__ = ("request_id", "recall", "token_budget", "is_dense")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    IS_DENSE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    recall: float
    token_budget: int
    is_dense: bool
    def __init__(self, request_id: _Optional[str] = ..., recall: _Optional[float] = ..., token_budget: _Optional[int] = ..., is_dense: bool = ...) -> None: ...

class KnobProgress(_message.Message):
    __slots__ = ("names", "frac")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    FRAC_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    frac: float
    def __init__(self, names: _Optional[_Iterable[str]] = ..., frac: _Optional[float] = ...) -> None: ...

class HostGauges(_message.Message):
    __slots__ = ("process_rss_bytes", "process_cpu_frac", "host_cpu_frac", "host_free_bytes", "gpu_used_bytes", "gpu_total_bytes", "gpu_util_frac", "pcie_h2d_bytes_per_s", "pcie_d2h_bytes_per_s", "pcie_generation", "pcie_width", "gpu_own_bytes", "gpu_others_bytes", "read_at", "pcie_counter", "pcie_interval_s", "pcie_fault", "gpu_fault", "gpu_slowdown")
    PROCESS_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_CPU_FRAC_FIELD_NUMBER: _ClassVar[int]
    HOST_CPU_FRAC_FIELD_NUMBER: _ClassVar[int]
    HOST_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_UTIL_FRAC_FIELD_NUMBER: _ClassVar[int]
    PCIE_H2D_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PCIE_D2H_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PCIE_GENERATION_FIELD_NUMBER: _ClassVar[int]
    PCIE_WIDTH_FIELD_NUMBER: _ClassVar[int]
    GPU_OWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_OTHERS_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_AT_FIELD_NUMBER: _ClassVar[int]
    PCIE_COUNTER_FIELD_NUMBER: _ClassVar[int]
    PCIE_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    PCIE_FAULT_FIELD_NUMBER: _ClassVar[int]
    GPU_FAULT_FIELD_NUMBER: _ClassVar[int]
    GPU_SLOWDOWN_FIELD_NUMBER: _ClassVar[int]
    process_rss_bytes: int
    process_cpu_frac: float
    host_cpu_frac: float
    host_free_bytes: int
    gpu_used_bytes: int
    gpu_total_bytes: int
    gpu_util_frac: float
    pcie_h2d_bytes_per_s: float
    pcie_d2h_bytes_per_s: float
    pcie_generation: int
    pcie_width: int
    gpu_own_bytes: int
    gpu_others_bytes: int
    read_at: float
    pcie_counter: PcieCounter
    pcie_interval_s: float
    pcie_fault: NvmlFault
    gpu_fault: NvmlFault
    gpu_slowdown: GpuSlowdown
    def __init__(self, process_rss_bytes: _Optional[int] = ..., process_cpu_frac: _Optional[float] = ..., host_cpu_frac: _Optional[float] = ..., host_free_bytes: _Optional[int] = ..., gpu_used_bytes: _Optional[int] = ..., gpu_total_bytes: _Optional[int] = ..., gpu_util_frac: _Optional[float] = ..., pcie_h2d_bytes_per_s: _Optional[float] = ..., pcie_d2h_bytes_per_s: _Optional[float] = ..., pcie_generation: _Optional[int] = ..., pcie_width: _Optional[int] = ..., gpu_own_bytes: _Optional[int] = ..., gpu_others_bytes: _Optional[int] = ..., read_at: _Optional[float] = ..., pcie_counter: _Optional[_Union[PcieCounter, str]] = ..., pcie_interval_s: _Optional[float] = ..., pcie_fault: _Optional[_Union[NvmlFault, str]] = ..., gpu_fault: _Optional[_Union[NvmlFault, str]] = ..., gpu_slowdown: _Optional[_Union[GpuSlowdown, str]] = ...) -> None: ...

class WorkloadContext(_message.Message):
    __slots__ = ("span_s", "num_requests", "requests_per_s", "input_tokens_p50", "input_tokens_p95", "output_tokens_p50", "output_tokens_p95", "concurrency", "hot_hit_frac", "h2d_bytes_per_token", "h2d_gb_per_s", "hbm_free_bytes", "attention_recall")
    SPAN_S_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_P50_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_P95_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_P50_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_P95_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    HOT_HIT_FRAC_FIELD_NUMBER: _ClassVar[int]
    H2D_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    H2D_GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    HBM_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_RECALL_FIELD_NUMBER: _ClassVar[int]
    span_s: float
    num_requests: int
    requests_per_s: float
    input_tokens_p50: float
    input_tokens_p95: float
    output_tokens_p50: float
    output_tokens_p95: float
    concurrency: float
    hot_hit_frac: float
    h2d_bytes_per_token: float
    h2d_gb_per_s: float
    hbm_free_bytes: int
    attention_recall: float
    def __init__(self, span_s: _Optional[float] = ..., num_requests: _Optional[int] = ..., requests_per_s: _Optional[float] = ..., input_tokens_p50: _Optional[float] = ..., input_tokens_p95: _Optional[float] = ..., output_tokens_p50: _Optional[float] = ..., output_tokens_p95: _Optional[float] = ..., concurrency: _Optional[float] = ..., hot_hit_frac: _Optional[float] = ..., h2d_bytes_per_token: _Optional[float] = ..., h2d_gb_per_s: _Optional[float] = ..., hbm_free_bytes: _Optional[int] = ..., attention_recall: _Optional[float] = ...) -> None: ...

class HbmUse(_message.Message):
    __slots__ = ("weights_bytes", "hot_pages_bytes", "summaries_bytes", "tables_bytes", "staging_bytes", "prefill_buffer_bytes", "rest_bytes", "others_bytes", "free_bytes", "peak_bytes")
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOT_PAGES_BYTES_FIELD_NUMBER: _ClassVar[int]
    SUMMARIES_BYTES_FIELD_NUMBER: _ClassVar[int]
    TABLES_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BUFFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    REST_BYTES_FIELD_NUMBER: _ClassVar[int]
    OTHERS_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    weights_bytes: int
    hot_pages_bytes: int
    summaries_bytes: int
    tables_bytes: int
    staging_bytes: int
    prefill_buffer_bytes: int
    rest_bytes: int
    others_bytes: int
    free_bytes: int
    peak_bytes: int
    def __init__(self, weights_bytes: _Optional[int] = ..., hot_pages_bytes: _Optional[int] = ..., summaries_bytes: _Optional[int] = ..., tables_bytes: _Optional[int] = ..., staging_bytes: _Optional[int] = ..., prefill_buffer_bytes: _Optional[int] = ..., rest_bytes: _Optional[int] = ..., others_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("ended_at", "window_s", "steps", "step_p50_s", "step_p95_s", "step_p99_s", "prompt_tokens_per_s", "generated_tokens_per_s", "hot_hit_frac", "miss_bytes_per_step", "h2d_bytes", "d2h_bytes", "h2d_gb_per_s", "d2h_gb_per_s", "attention_recall", "num_running", "num_waiting", "hot_used_frac", "dram_used_frac", "requests_finished", "ttft_p50_s", "ttft_p95_s", "tpot_p50_s", "tpot_p95_s", "host", "knobs", "misses_per_step", "working_set_pages", "working_set_bytes", "metadata_bytes", "step_s", "selected_pages_per_step", "exposed_s_per_step", "waiting", "hbm", "context", "recall_samples")
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_P50_S_FIELD_NUMBER: _ClassVar[int]
    STEP_P95_S_FIELD_NUMBER: _ClassVar[int]
    STEP_P99_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    HOT_HIT_FRAC_FIELD_NUMBER: _ClassVar[int]
    MISS_BYTES_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    H2D_BYTES_FIELD_NUMBER: _ClassVar[int]
    D2H_BYTES_FIELD_NUMBER: _ClassVar[int]
    H2D_GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    D2H_GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_RECALL_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    HOT_USED_FRAC_FIELD_NUMBER: _ClassVar[int]
    DRAM_USED_FRAC_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    TTFT_P50_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_P95_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_P50_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_P95_S_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    MISSES_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    WORKING_SET_PAGES_FIELD_NUMBER: _ClassVar[int]
    WORKING_SET_BYTES_FIELD_NUMBER: _ClassVar[int]
    METADATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    SELECTED_PAGES_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    HBM_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    RECALL_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ended_at: float
    window_s: float
    steps: int
    step_p50_s: float
    step_p95_s: float
    step_p99_s: float
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    hot_hit_frac: float
    miss_bytes_per_step: float
    h2d_bytes: int
    d2h_bytes: int
    h2d_gb_per_s: float
    d2h_gb_per_s: float
    attention_recall: float
    num_running: int
    num_waiting: int
    hot_used_frac: float
    dram_used_frac: float
    requests_finished: int
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    host: HostGauges
    knobs: Knobs
    misses_per_step: float
    working_set_pages: int
    working_set_bytes: int
    metadata_bytes: int
    step_s: float
    selected_pages_per_step: float
    exposed_s_per_step: float
    waiting: _containers.RepeatedCompositeFieldContainer[WaitCount]
    hbm: HbmUse
    context: WorkloadContext
    recall_samples: int
    def __init__(self, ended_at: _Optional[float] = ..., window_s: _Optional[float] = ..., steps: _Optional[int] = ..., step_p50_s: _Optional[float] = ..., step_p95_s: _Optional[float] = ..., step_p99_s: _Optional[float] = ..., prompt_tokens_per_s: _Optional[float] = ..., generated_tokens_per_s: _Optional[float] = ..., hot_hit_frac: _Optional[float] = ..., miss_bytes_per_step: _Optional[float] = ..., h2d_bytes: _Optional[int] = ..., d2h_bytes: _Optional[int] = ..., h2d_gb_per_s: _Optional[float] = ..., d2h_gb_per_s: _Optional[float] = ..., attention_recall: _Optional[float] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., hot_used_frac: _Optional[float] = ..., dram_used_frac: _Optional[float] = ..., requests_finished: _Optional[int] = ..., ttft_p50_s: _Optional[float] = ..., ttft_p95_s: _Optional[float] = ..., tpot_p50_s: _Optional[float] = ..., tpot_p95_s: _Optional[float] = ..., host: _Optional[_Union[HostGauges, _Mapping]] = ..., knobs: _Optional[_Union[Knobs, _Mapping]] = ..., misses_per_step: _Optional[float] = ..., working_set_pages: _Optional[int] = ..., working_set_bytes: _Optional[int] = ..., metadata_bytes: _Optional[int] = ..., step_s: _Optional[float] = ..., selected_pages_per_step: _Optional[float] = ..., exposed_s_per_step: _Optional[float] = ..., waiting: _Optional[_Iterable[_Union[WaitCount, _Mapping]]] = ..., hbm: _Optional[_Union[HbmUse, _Mapping]] = ..., context: _Optional[_Union[WorkloadContext, _Mapping]] = ..., recall_samples: _Optional[int] = ...) -> None: ...

class Slo(_message.Message):
    __slots__ = ("ttft_s", "tpot_s", "min_recall")
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    MIN_RECALL_FIELD_NUMBER: _ClassVar[int]
    ttft_s: float
    tpot_s: float
    min_recall: float
    def __init__(self, ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., min_recall: _Optional[float] = ...) -> None: ...

class DaemonStatus(_message.Message):
    __slots__ = ("state", "reasons", "version", "pid", "uptime_s", "http_url", "model", "device", "dtype", "knobs", "plan", "profile", "engine_restarts", "requests_failed", "store_lost_writes", "tuner_mode", "facts", "stats", "snapshot", "slo")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    HTTP_URL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    STORE_LOST_WRITES_FIELD_NUMBER: _ClassVar[int]
    TUNER_MODE_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    state: DaemonState
    reasons: _containers.RepeatedScalarFieldContainer[str]
    version: str
    pid: int
    uptime_s: float
    http_url: str
    model: str
    device: str
    dtype: str
    knobs: Knobs
    plan: MemoryPlan
    profile: str
    engine_restarts: int
    requests_failed: int
    store_lost_writes: int
    tuner_mode: TunerMode
    facts: EngineFacts
    stats: EngineStats
    snapshot: Snapshot
    slo: Slo
    def __init__(self, state: _Optional[_Union[DaemonState, str]] = ..., reasons: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_s: _Optional[float] = ..., http_url: _Optional[str] = ..., model: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., knobs: _Optional[_Union[Knobs, _Mapping]] = ..., plan: _Optional[_Union[MemoryPlan, _Mapping]] = ..., profile: _Optional[str] = ..., engine_restarts: _Optional[int] = ..., requests_failed: _Optional[int] = ..., store_lost_writes: _Optional[int] = ..., tuner_mode: _Optional[_Union[TunerMode, str]] = ..., facts: _Optional[_Union[EngineFacts, _Mapping]] = ..., stats: _Optional[_Union[EngineStats, _Mapping]] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., slo: _Optional[_Union[Slo, _Mapping]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("made_at", "values", "reason", "predicted_score", "current_score")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KnobValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...
    MADE_AT_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_SCORE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_SCORE_FIELD_NUMBER: _ClassVar[int]
    made_at: float
    values: _containers.MessageMap[str, KnobValue]
    reason: str
    predicted_score: float
    current_score: float
    def __init__(self, made_at: _Optional[float] = ..., values: _Optional[_Mapping[str, KnobValue]] = ..., reason: _Optional[str] = ..., predicted_score: _Optional[float] = ..., current_score: _Optional[float] = ...) -> None: ...

class TunerState(_message.Message):
    __slots__ = ("mode", "num_observations", "decisions", "rollouts", "pins", "frozen", "killed", "safe_mode", "hold", "explored_frac", "load")
    MODE_FIELD_NUMBER: _ClassVar[int]
    NUM_OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    KILLED_FIELD_NUMBER: _ClassVar[int]
    SAFE_MODE_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    EXPLORED_FRAC_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    mode: TunerMode
    num_observations: int
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    rollouts: _containers.RepeatedCompositeFieldContainer[RolloutRecord]
    pins: _containers.RepeatedScalarFieldContainer[str]
    frozen: bool
    killed: bool
    safe_mode: bool
    hold: str
    explored_frac: float
    load: LoadState
    def __init__(self, mode: _Optional[_Union[TunerMode, str]] = ..., num_observations: _Optional[int] = ..., decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., rollouts: _Optional[_Iterable[_Union[RolloutRecord, _Mapping]]] = ..., pins: _Optional[_Iterable[str]] = ..., frozen: bool = ..., killed: bool = ..., safe_mode: bool = ..., hold: _Optional[str] = ..., explored_frac: _Optional[float] = ..., load: _Optional[_Union[LoadState, _Mapping]] = ...) -> None: ...

class RolloutRecord(_message.Message):
    __slots__ = ("state", "reason", "config_from", "config_to", "initiated_by", "at", "regime_id", "profile")
    class ConfigFromEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KnobValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...
    class ConfigToEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KnobValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FROM_FIELD_NUMBER: _ClassVar[int]
    CONFIG_TO_FIELD_NUMBER: _ClassVar[int]
    INITIATED_BY_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    REGIME_ID_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    state: RolloutState
    reason: RolloutReason
    config_from: _containers.MessageMap[str, KnobValue]
    config_to: _containers.MessageMap[str, KnobValue]
    initiated_by: str
    at: float
    regime_id: int
    profile: str
    def __init__(self, state: _Optional[_Union[RolloutState, str]] = ..., reason: _Optional[_Union[RolloutReason, str]] = ..., config_from: _Optional[_Mapping[str, KnobValue]] = ..., config_to: _Optional[_Mapping[str, KnobValue]] = ..., initiated_by: _Optional[str] = ..., at: _Optional[float] = ..., regime_id: _Optional[int] = ..., profile: _Optional[str] = ...) -> None: ...

class Regime(_message.Message):
    __slots__ = ("regime_id", "centroid", "signature", "seen_s", "seen_at", "incumbent", "verified_at", "versions")
    class CentroidEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class IncumbentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KnobValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REGIME_ID_FIELD_NUMBER: _ClassVar[int]
    CENTROID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SEEN_S_FIELD_NUMBER: _ClassVar[int]
    SEEN_AT_FIELD_NUMBER: _ClassVar[int]
    INCUMBENT_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_AT_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    regime_id: int
    centroid: _containers.ScalarMap[str, float]
    signature: str
    seen_s: float
    seen_at: float
    incumbent: _containers.MessageMap[str, KnobValue]
    verified_at: float
    versions: _containers.ScalarMap[str, str]
    def __init__(self, regime_id: _Optional[int] = ..., centroid: _Optional[_Mapping[str, float]] = ..., signature: _Optional[str] = ..., seen_s: _Optional[float] = ..., seen_at: _Optional[float] = ..., incumbent: _Optional[_Mapping[str, KnobValue]] = ..., verified_at: _Optional[float] = ..., versions: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LoadState(_message.Message):
    __slots__ = ("regimes", "current", "is_settled", "drift", "loss_frac")
    REGIMES_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    IS_SETTLED_FIELD_NUMBER: _ClassVar[int]
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FRAC_FIELD_NUMBER: _ClassVar[int]
    regimes: _containers.RepeatedCompositeFieldContainer[Regime]
    current: int
    is_settled: bool
    drift: str
    loss_frac: float
    def __init__(self, regimes: _Optional[_Iterable[_Union[Regime, _Mapping]]] = ..., current: _Optional[int] = ..., is_settled: bool = ..., drift: _Optional[str] = ..., loss_frac: _Optional[float] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("name", "value", "unit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    unit: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., unit: _Optional[str] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("bound", "reason", "share", "limit", "evidence", "age_s", "num_windows", "left_out")
    BOUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    bound: Bound
    reason: str
    share: float
    limit: WaitReason
    evidence: _containers.RepeatedCompositeFieldContainer[Evidence]
    age_s: float
    num_windows: int
    left_out: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bound: _Optional[_Union[Bound, str]] = ..., reason: _Optional[str] = ..., share: _Optional[float] = ..., limit: _Optional[_Union[WaitReason, str]] = ..., evidence: _Optional[_Iterable[_Union[Evidence, _Mapping]]] = ..., age_s: _Optional[float] = ..., num_windows: _Optional[int] = ..., left_out: _Optional[_Iterable[str]] = ...) -> None: ...

class Remedy(_message.Message):
    __slots__ = ("knob", "up", "why")
    KNOB_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    knob: str
    up: bool
    why: str
    def __init__(self, knob: _Optional[str] = ..., up: bool = ..., why: _Optional[str] = ...) -> None: ...

class TriedChange(_message.Message):
    __slots__ = ("decision_id", "decided_at", "state", "values", "words")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KnobValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    DECIDED_AT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    decision_id: int
    decided_at: float
    state: DecisionState
    values: _containers.MessageMap[str, KnobValue]
    words: str
    def __init__(self, decision_id: _Optional[int] = ..., decided_at: _Optional[float] = ..., state: _Optional[_Union[DecisionState, str]] = ..., values: _Optional[_Mapping[str, KnobValue]] = ..., words: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("verdict", "remedies", "advised", "tried", "rollouts", "load")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REMEDIES_FIELD_NUMBER: _ClassVar[int]
    ADVISED_FIELD_NUMBER: _ClassVar[int]
    TRIED_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    verdict: Verdict
    remedies: _containers.RepeatedCompositeFieldContainer[Remedy]
    advised: _containers.RepeatedCompositeFieldContainer[Decision]
    tried: _containers.RepeatedCompositeFieldContainer[TriedChange]
    rollouts: _containers.RepeatedCompositeFieldContainer[RolloutRecord]
    load: LoadState
    def __init__(self, verdict: _Optional[_Union[Verdict, _Mapping]] = ..., remedies: _Optional[_Iterable[_Union[Remedy, _Mapping]]] = ..., advised: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., tried: _Optional[_Iterable[_Union[TriedChange, _Mapping]]] = ..., rollouts: _Optional[_Iterable[_Union[RolloutRecord, _Mapping]]] = ..., load: _Optional[_Union[LoadState, _Mapping]] = ...) -> None: ...

class ProfileKey(_message.Message):
    __slots__ = ("hardware", "model", "dtype")
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    hardware: str
    model: str
    dtype: str
    def __init__(self, hardware: _Optional[str] = ..., model: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("key", "values", "status", "workload", "objective", "default_scores", "winner_scores", "versions", "created_at", "pinned", "profile_id", "shape", "seed")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KnobValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SCORES_FIELD_NUMBER: _ClassVar[int]
    WINNER_SCORES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    key: ProfileKey
    values: _containers.MessageMap[str, KnobValue]
    status: ProfileStatus
    workload: str
    objective: Objective
    default_scores: _containers.RepeatedScalarFieldContainer[float]
    winner_scores: _containers.RepeatedScalarFieldContainer[float]
    versions: _containers.ScalarMap[str, str]
    created_at: float
    pinned: bool
    profile_id: int
    shape: ModelShape
    seed: str
    def __init__(self, key: _Optional[_Union[ProfileKey, _Mapping]] = ..., values: _Optional[_Mapping[str, KnobValue]] = ..., status: _Optional[_Union[ProfileStatus, str]] = ..., workload: _Optional[str] = ..., objective: _Optional[_Union[Objective, str]] = ..., default_scores: _Optional[_Iterable[float]] = ..., winner_scores: _Optional[_Iterable[float]] = ..., versions: _Optional[_Mapping[str, str]] = ..., created_at: _Optional[float] = ..., pinned: bool = ..., profile_id: _Optional[int] = ..., shape: _Optional[_Union[ModelShape, _Mapping]] = ..., seed: _Optional[str] = ...) -> None: ...

class ModelShape(_message.Message):
    __slots__ = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size", "max_position", "num_parameters", "tied_embeddings")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TIED_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    num_parameters: int
    tied_embeddings: bool
    def __init__(self, num_layers: _Optional[int] = ..., num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., hidden_size: _Optional[int] = ..., intermediate_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_position: _Optional[int] = ..., num_parameters: _Optional[int] = ..., tied_embeddings: bool = ...) -> None: ...

class RecordedRequest(_message.Message):
    __slots__ = ("arrival_s", "input_tokens", "output_tokens", "max_tokens", "block_ids")
    ARRIVAL_S_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    arrival_s: float
    input_tokens: int
    output_tokens: int
    max_tokens: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, arrival_s: _Optional[float] = ..., input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RecordingPart(_message.Message):
    __slots__ = ("requests", "num_running", "num_left_out", "is_over")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    IS_OVER_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RecordedRequest]
    num_running: int
    num_left_out: int
    is_over: bool
    def __init__(self, requests: _Optional[_Iterable[_Union[RecordedRequest, _Mapping]]] = ..., num_running: _Optional[int] = ..., num_left_out: _Optional[int] = ..., is_over: bool = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status", "revision")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    status: DaemonStatus
    revision: int
    def __init__(self, status: _Optional[_Union[DaemonStatus, _Mapping]] = ..., revision: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("options", "timeout_s")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    timeout_s: float
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_cut_off",)
    NUM_CUT_OFF_FIELD_NUMBER: _ClassVar[int]
    num_cut_off: int
    def __init__(self, num_cut_off: _Optional[int] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class StopResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetLogLevelRequest(_message.Message):
    __slots__ = ("options", "level")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    level: str
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., level: _Optional[str] = ...) -> None: ...

class SetLogLevelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StartRecordingRequest(_message.Message):
    __slots__ = ("options", "duration_s", "max_requests")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    duration_s: float
    max_requests: int
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., duration_s: _Optional[float] = ..., max_requests: _Optional[int] = ...) -> None: ...

class StartRecordingResponse(_message.Message):
    __slots__ = ("recording_id",)
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    recording_id: int
    def __init__(self, recording_id: _Optional[int] = ...) -> None: ...

class TakeRecordingRequest(_message.Message):
    __slots__ = ("options", "recording_id", "stop")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    RECORDING_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    recording_id: int
    stop: bool
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., recording_id: _Optional[int] = ..., stop: bool = ...) -> None: ...

class TakeRecordingResponse(_message.Message):
    __slots__ = ("part",)
    PART_FIELD_NUMBER: _ClassVar[int]
    part: RecordingPart
    def __init__(self, part: _Optional[_Union[RecordingPart, _Mapping]] = ...) -> None: ...

class CollectBundleRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CollectBundleResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class StartTuningRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class StartTuningResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class StopTuningRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class StopTuningResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class PauseResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class SetModeRequest(_message.Message):
    __slots__ = ("options", "mode")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    mode: TunerMode
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., mode: _Optional[_Union[TunerMode, str]] = ...) -> None: ...

class SetModeResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchEventsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTrialsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTrialsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("explanation",)
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    explanation: Explanation
    def __init__(self, explanation: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...

class ApproveRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class ApproveResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class RejectRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class RejectResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("options", "knob")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    KNOB_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    knob: str
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., knob: _Optional[str] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("options", "knob")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    KNOB_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    knob: str
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., knob: _Optional[str] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: TunerState
    def __init__(self, state: _Optional[_Union[TunerState, _Mapping]] = ...) -> None: ...

class ListKnobsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListKnobsResponse(_message.Message):
    __slots__ = ("knobs", "revision")
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    knobs: _containers.RepeatedCompositeFieldContainer[KnobState]
    revision: int
    def __init__(self, knobs: _Optional[_Iterable[_Union[KnobState, _Mapping]]] = ..., revision: _Optional[int] = ...) -> None: ...

class SetKnobsRequest(_message.Message):
    __slots__ = ("options", "values")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: KnobValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[KnobValue, _Mapping]] = ...) -> None: ...
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    values: _containers.MessageMap[str, KnobValue]
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., values: _Optional[_Mapping[str, KnobValue]] = ...) -> None: ...

class SetKnobsResponse(_message.Message):
    __slots__ = ("knobs",)
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    knobs: _containers.RepeatedCompositeFieldContainer[KnobState]
    def __init__(self, knobs: _Optional[_Iterable[_Union[KnobState, _Mapping]]] = ...) -> None: ...

class ResetKnobsRequest(_message.Message):
    __slots__ = ("options", "names")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class ResetKnobsResponse(_message.Message):
    __slots__ = ("knobs",)
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    knobs: _containers.RepeatedCompositeFieldContainer[KnobState]
    def __init__(self, knobs: _Optional[_Iterable[_Union[KnobState, _Mapping]]] = ...) -> None: ...

class ListProfilesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListProfilesResponse(_message.Message):
    __slots__ = ("profiles",)
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    profiles: _containers.RepeatedCompositeFieldContainer[Profile]
    def __init__(self, profiles: _Optional[_Iterable[_Union[Profile, _Mapping]]] = ...) -> None: ...

class GetProfileRequest(_message.Message):
    __slots__ = ("profile_id",)
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    profile_id: int
    def __init__(self, profile_id: _Optional[int] = ...) -> None: ...

class GetProfileResponse(_message.Message):
    __slots__ = ("profile",)
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    profile: Profile
    def __init__(self, profile: _Optional[_Union[Profile, _Mapping]] = ...) -> None: ...

class ImportProfileRequest(_message.Message):
    __slots__ = ("options", "text")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    text: str
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., text: _Optional[str] = ...) -> None: ...

class ImportProfileResponse(_message.Message):
    __slots__ = ("profile",)
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    profile: Profile
    def __init__(self, profile: _Optional[_Union[Profile, _Mapping]] = ...) -> None: ...

class ExportProfileRequest(_message.Message):
    __slots__ = ("profile_id", "format", "engine_version", "force")
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    profile_id: int
    format: ExportFormat
    engine_version: str
    force: bool
    def __init__(self, profile_id: _Optional[int] = ..., format: _Optional[_Union[ExportFormat, str]] = ..., engine_version: _Optional[str] = ..., force: bool = ...) -> None: ...

class ExportProfileResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class PinProfileRequest(_message.Message):
    __slots__ = ("options", "profile_id")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    profile_id: int
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., profile_id: _Optional[int] = ...) -> None: ...

class PinProfileResponse(_message.Message):
    __slots__ = ("profile",)
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    profile: Profile
    def __init__(self, profile: _Optional[_Union[Profile, _Mapping]] = ...) -> None: ...

class ApplyProfileRequest(_message.Message):
    __slots__ = ("options", "profile_id")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    profile_id: int
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., profile_id: _Optional[int] = ...) -> None: ...

class ApplyProfileResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackProfileRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class RollbackProfileResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DiffProfilesRequest(_message.Message):
    __slots__ = ("left_id", "right_id")
    LEFT_ID_FIELD_NUMBER: _ClassVar[int]
    RIGHT_ID_FIELD_NUMBER: _ClassVar[int]
    left_id: int
    right_id: int
    def __init__(self, left_id: _Optional[int] = ..., right_id: _Optional[int] = ...) -> None: ...

class DiffProfilesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteProfileRequest(_message.Message):
    __slots__ = ("options", "profile_id")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    profile_id: int
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., profile_id: _Optional[int] = ...) -> None: ...

class DeleteProfileResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateStudyRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class CreateStudyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStudyRequest(_message.Message):
    __slots__ = ("study_id",)
    STUDY_ID_FIELD_NUMBER: _ClassVar[int]
    study_id: int
    def __init__(self, study_id: _Optional[int] = ...) -> None: ...

class GetStudyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListStudiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListStudiesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelStudyRequest(_message.Message):
    __slots__ = ("options", "study_id")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    STUDY_ID_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    study_id: int
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ..., study_id: _Optional[int] = ...) -> None: ...

class CancelStudyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SnapshotResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: Snapshot
    def __init__(self, snapshot: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class ProbePcieRequest(_message.Message):
    __slots__ = ("options",)
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    options: MutationOptions
    def __init__(self, options: _Optional[_Union[MutationOptions, _Mapping]] = ...) -> None: ...

class ProbePcieResponse(_message.Message):
    __slots__ = ("link",)
    LINK_FIELD_NUMBER: _ClassVar[int]
    link: LinkProbe
    def __init__(self, link: _Optional[_Union[LinkProbe, _Mapping]] = ...) -> None: ...

class ListAuditRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAuditResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyAuditRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyAuditResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
