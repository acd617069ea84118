"""The one vocabulary of sparsed: values that cross folders, and nothing else.

Every class here is a frozen value, an enum or an exception. Behaviour is limited to validation
and derived properties; imports are limited to the standard library.

Words: a *lane* is (request, layer, KV head). A *page* is ``page_size`` consecutive tokens of a
lane. A *block* is 128 tokens of a lane. A *frame* is one block of every lane of a request. The
*hot tier* is the bounded arena attention reads from; the *DRAM tier* holds every sealed page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum, StrEnum
from fractions import Fraction
from math import isfinite

BLOCK_TOKENS = 128
PAGE_SIZES = (8, 16, 32, 64, 128)
GIB = 1 << 30

# --------------------------------------------------------------------------------------------
# Errors that cross folders
# --------------------------------------------------------------------------------------------


class ExitCode(IntEnum):
    """Process exit codes of the local verbs (sysexits numbering)."""

    OK = 0
    USAGE = 64
    DATA = 65
    UNAVAILABLE = 69
    SOFTWARE = 70
    TEMPORARY = 75
    NO_PERMISSION = 77
    CONFIG = 78


class InputError(ValueError):
    """A value given by a user is wrong. ``field`` names it; the message says what to do; ``code``
    is the exit status where it stops a start: USAGE, CONFIG for a file, DATA for a model."""

    def __init__(
        self, message: str, *, field: str | None = None, code: ExitCode = ExitCode.USAGE
    ) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class CapacityError(InputError):
    """A request that can never fit: longer than the model, the hot tier or the DRAM tier."""


class FailureCause(StrEnum):
    """Why an engine process ended or never started, as far as it says something of its knobs."""

    DEVICE_MEMORY = "device-memory"
    HOST_MEMORY = "host-memory"  # also what could not be pinned
    DEVICE = "device"  # a call of the driver failed for another reason
    CONFIG = "config"  # what was asked for is wrong or does not fit
    HANG = "hang"
    KILLED = "killed"  # by a SIGKILL that nobody can show to be the kernel's for want of memory
    OTHER = "other"


class StartError(Exception):
    """Start-up cannot go on; the message is one line for the user, ``code`` the exit status."""

    def __init__(
        self, message: str, *, code: ExitCode, cause: FailureCause = FailureCause.OTHER
    ) -> None:
        super().__init__(message)
        self.code = code
        self.cause = cause


# --------------------------------------------------------------------------------------------
# Knobs
# --------------------------------------------------------------------------------------------


class SparseMethod(StrEnum):
    """How decode chooses the pages it attends to."""

    DENSE = "dense"
    MEAN_KEY = "mean-key"
    CUBOID_MEAN = "cuboid-mean"
    QUEST = "quest"


class Profiling(StrEnum):
    """Whether the daemon measures while it serves."""

    ON = "on"
    OFF = "off"


class KnobClass(StrEnum):
    """When a change takes effect: between two steps, or in a new process."""

    HOT = "hot"
    RESTART = "restart"


KnobValue = int | float | str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobSpec:
    """Name, unit, range and class of one knob. ``default`` None: taken from the machine."""

    name: str
    unit: str
    klass: KnobClass
    help: str
    default: KnobValue = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[int | str, ...] = ()
    auto: bool = False  # the value "auto" (None) is allowed and resolved by a closed form
    integer: bool = True

    def check(self, value: object) -> KnobValue:
        """Return ``value`` as this knob's type; InputError with the allowed range otherwise."""
        if value is None or value == "auto":
            if self.auto:
                return None
            raise InputError(f"{self.name} cannot be 'auto'; {self.allowed}", field=self.name)
        parsed = self._parse(value)
        if self.choices and parsed not in self.choices:
            raise InputError(f"{self.name}={value!r}: {self.allowed}", field=self.name)
        if isinstance(parsed, int | float):
            low, high = self.minimum, self.maximum
            if (low is not None and parsed < low) or (high is not None and parsed > high):
                raise InputError(f"{self.name}={value!r}: {self.allowed}", field=self.name)
        return parsed

    @property
    def allowed(self) -> str:
        """The allowed values in words, for error messages and listings."""
        if self.choices:
            text = "one of " + ", ".join(str(choice) for choice in self.choices)
        else:
            low = f"{self.minimum:.8g}" if self.minimum is not None else "any"
            high = f"{self.maximum:.8g}" if self.maximum is not None else "any"
            text = f"{low} to {high} {self.unit}"
        return f"allowed: {text}" + (", or auto" if self.auto else "")

    def _parse(self, value: object) -> int | float | str:
        if self.choices and isinstance(self.choices[0], str):
            return str(value)
        try:
            number = float(str(value))
        except ValueError:
            raise InputError(
                f"{self.name}={value!r} is not a number; {self.allowed}", field=self.name
            ) from None
        if isinstance(value, bool) or not isfinite(number):
            raise InputError(f"{self.name}={value!r}: {self.allowed}", field=self.name)
        if not self.integer:
            return number
        if number != int(number):
            raise InputError(
                f"{self.name}={value!r} is not a whole number; {self.allowed}", field=self.name
            )
        return int(number)


KNOB_SPECS: tuple[KnobSpec, ...] = (
    KnobSpec(
        name="token_budget",
        unit="tokens",
        klass=KnobClass.HOT,
        default=2048,
        minimum=256,
        maximum=8192,
        help="tokens each lane attends to in a decode step",
    ),
    KnobSpec(
        name="hbm_budget",
        unit="tokens",
        klass=KnobClass.HOT,
        default=None,
        minimum=256,
        maximum=32768,
        auto=True,
        help="tokens a request keeps in the hot tier per lane; auto divides the tier by what requests miss",
    ),
    KnobSpec(
        name="max_num_active_seqs",
        unit="requests",
        klass=KnobClass.HOT,
        default=None,
        minimum=1,
        maximum=1024,
        help="requests that run at once, at most max_num_seqs",
    ),
    KnobSpec(
        name="prefill_chunk",
        unit="tokens",
        klass=KnobClass.HOT,
        default=2048,
        minimum=16,
        maximum=32768,
        help="prompt tokens computed in one step, all requests together",
    ),
    KnobSpec(
        name="residency_watermark",
        unit="share",
        klass=KnobClass.HOT,
        default=0.1,
        minimum=0.0,
        maximum=0.5,
        integer=False,
        help="part of the hot tier that stays free while requests are kept there whole; below it "
        "they keep what they have a right to",
    ),
    KnobSpec(
        name="copy_programs",
        unit="programs",
        klass=KnobClass.HOT,
        default=None,
        minimum=1,
        maximum=1024,
        auto=True,
        help="on a GPU: programs that load pages from the DRAM tier; auto is what the link's "
        "calibration found",
    ),
    KnobSpec(
        name="retrieval_stride",
        unit="steps",
        klass=KnobClass.HOT,
        default=1,
        minimum=1,
        maximum=16,
        help="decode steps of a request that attend to one selection of pages, until a page is "
        "full; 1: each selects anew",
    ),
    KnobSpec(
        name="profiler",
        unit="",
        klass=KnobClass.HOT,
        default=Profiling.ON.value,
        choices=tuple(word.value for word in Profiling),
        help="off: no windows, samples of attention recall, timed fetches or gauges, so no advice, "
        "no recall floor, and gauges are absent",
    ),
    KnobSpec(
        name="page_size",
        unit="tokens",
        klass=KnobClass.RESTART,
        default=None,
        choices=PAGE_SIZES,
        help="tokens of a page, the unit of selection and transfer",
    ),
    KnobSpec(
        name="sparse_method",
        unit="",
        klass=KnobClass.RESTART,
        default=SparseMethod.MEAN_KEY.value,
        choices=tuple(method.value for method in SparseMethod),
        help="how pages are ranked; dense attends to all of them, mean-key learns a basis of keys "
        "at a model's first start",
    ),
    KnobSpec(
        name="dense_layers",
        unit="layers",
        klass=KnobClass.RESTART,
        default=0,
        minimum=0,
        maximum=256,
        help="first layers that always attend to every token",
    ),
    KnobSpec(
        name="max_num_seqs",
        unit="requests",
        klass=KnobClass.RESTART,
        default=None,
        minimum=1,
        maximum=1024,
        help="capacity for running requests",
    ),
    KnobSpec(
        name="kv_hbm_gib",
        unit="GiB",
        klass=KnobClass.RESTART,
        default=None,
        minimum=0.001,
        maximum=4096,
        integer=False,
        help="hot tier: pages, summaries, tables, staging and prefill buffers together",
    ),
    KnobSpec(
        name="kv_dram_gib",
        unit="GiB",
        klass=KnobClass.RESTART,
        default=None,
        minimum=0.001,
        maximum=65536,
        integer=False,
        help="DRAM tier: the pool that holds every sealed page",
    ),
    KnobSpec(
        name="max_model_len",
        unit="tokens",
        klass=KnobClass.RESTART,
        default=None,
        minimum=128,
        maximum=16_777_216,
        help="longest prompt plus output of a request",
    ),
)

KNOBS_BY_NAME: Mapping[str, KnobSpec] = {spec.name: spec for spec in KNOB_SPECS}
RECALL_KNOBS = frozenset({"token_budget", "retrieval_stride"})  # hot ones, by which recall differs


@dataclass(frozen=True, kw_only=True, slots=True)
class Knobs:
    """A complete, resolved set of knob values; names and units as in ``KNOB_SPECS``.

    ``hbm_budget`` None means the closed form (shares of the hot tier by what requests miss, never
    less than ``token_budget``), ``copy_programs`` None the calibrated number. Errors: InputError naming the
    knob.
    """

    token_budget: int
    hbm_budget: int | None
    max_num_active_seqs: int
    prefill_chunk: int
    page_size: int
    sparse_method: str
    dense_layers: int
    max_num_seqs: int
    kv_hbm_gib: float
    kv_dram_gib: float
    max_model_len: int
    copy_programs: int | None = None
    residency_watermark: float = 0.1
    retrieval_stride: int = 1
    profiler: str = Profiling.ON.value

    def __post_init__(self) -> None:
        for spec in KNOB_SPECS:
            spec.check(getattr(self, spec.name))
        if self.max_num_active_seqs > self.max_num_seqs:
            raise InputError(
                f"max_num_active_seqs={self.max_num_active_seqs} is above "
                f"max_num_seqs={self.max_num_seqs}; lower it or restart with a larger capacity",
                field="max_num_active_seqs",
            )
        if self.hbm_budget is not None and self.hbm_budget < self.token_budget:
            raise InputError(
                f"hbm_budget={self.hbm_budget} is below token_budget={self.token_budget}; "
                "raise hbm_budget or lower token_budget",
                field="hbm_budget",
            )
        if self.token_budget < 4 * self.page_size:
            raise InputError(
                f"token_budget={self.token_budget} holds fewer than four pages of "
                f"{self.page_size} tokens; raise token_budget or lower page_size",
                field="token_budget",
            )

    @property
    def is_profiled(self) -> bool:
        return self.profiler == Profiling.ON

    def with_values(self, values: Mapping[str, KnobValue]) -> Knobs:
        """A copy with ``values`` changed; InputError on an unknown name or a bad value."""
        return replace(self, **check_knob_values(values))  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, KnobValue]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


def check_knob_values(values: Mapping[str, object]) -> dict[str, KnobValue]:
    """Check each value alone; InputError naming the knob, and its neighbours if unknown."""
    checked: dict[str, KnobValue] = {}
    for name, value in values.items():
        spec = KNOBS_BY_NAME.get(name)
        if spec is None:
            known = ", ".join(sorted(KNOBS_BY_NAME))
            raise InputError(f"unknown knob {name!r}; known: {known}", field=name)
        checked[name] = spec.check(value)
    return checked


# --------------------------------------------------------------------------------------------
# Model and machine
# --------------------------------------------------------------------------------------------

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes memory arithmetic needs; counts, and bytes where the name says so."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    num_parameters: int
    tied_embeddings: bool = False

    @property
    def num_lanes(self) -> int:
        """Lanes of one request."""
        return self.num_layers * self.num_kv_heads

    def kv_bytes_per_token(self, dtype: str) -> int:
        """K and V of one token over all layers and KV heads."""
        return self.num_lanes * 2 * self.head_dim * DTYPE_BYTES[dtype]

    def weight_bytes(self, dtype: str) -> int:
        return self.num_parameters * DTYPE_BYTES[dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFacts:
    """What the machine offers at start. ``hbm_*`` describe the CUDA device, 0 on a CPU."""

    cpu_name: str
    num_cpus: int
    dram_total_bytes: int
    dram_free_bytes: int  # available memory, already cut to the cgroup limit
    gpu_name: str | None = None
    gpu_uuid: str | None = None
    num_gpus: int = 0
    hbm_total_bytes: int = 0
    hbm_free_bytes: int = 0
    driver_version: str | None = None
    pcie_generation: int | None = None  # the highest that GPU and slot agree on
    pcie_width: int | None = None  # likewise, lanes

    @property
    def fingerprint(self) -> str:
        """Key of profiles: the GPU, or the CPU where there is none."""
        if self.gpu_name:
            return f"gpu:{self.gpu_name}:{round(self.hbm_total_bytes / GIB)}GiB"
        return f"cpu:{self.cpu_name}:{self.num_cpus}:{round(self.dram_total_bytes / GIB)}GiB"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes per tier and part, fixed before the engine starts. Parts of the hot tier sum up to
    at most ``kv_hbm_gib``; counts are capacities."""

    weights_bytes: int
    hot_pages_bytes: int
    summaries_bytes: int
    tables_bytes: int
    staging_bytes: int
    prefill_buffer_bytes: int
    dram_pool_bytes: int
    num_blocks: int  # blocks of the hot arena, over all lanes
    num_frames: int  # frames of the DRAM pool; the hot tier holds the summaries of each

    @property
    def hot_bytes(self) -> int:
        return (
            self.hot_pages_bytes
            + self.summaries_bytes
            + self.tables_bytes
            + self.staging_bytes
            + self.prefill_buffer_bytes
        )

    @property
    def max_tokens(self) -> int:
        """Tokens of all requests together that the DRAM tier can hold."""
        return self.num_frames * BLOCK_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkProbe:
    """Bytes per second between the tiers, measured at start; on a CPU a memory copy."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuRates:
    """What a GPU carries, as far as a prediction needs it. ``copy_bytes_per_s``: read and written
    by a copy in its memory; ``link_bytes_per_s``: pages loaded by a kernel; ``is_measured``: else
    scaled from data sheets."""

    name: str
    hbm_bytes: int
    copy_bytes_per_s: float
    link_bytes_per_s: float
    matmul_flop_per_s: float  # large products in bfloat16
    is_measured: bool


class Direction(StrEnum):
    """Of a copy between the tiers: loads into the hot tier are H2D, saves are D2H."""

    H2D = "h2d"
    D2H = "d2h"


class CopyPath(StrEnum):
    """How scattered pieces cross the link."""

    KERNEL = "kernel"  # a GPU kernel reads or writes pinned memory through its address
    COPY_ENGINE = "copy-engine"  # a DMA for each run of neighbours
    BATCHED = "batched"  # all runs handed to the driver in one call
    STAGED = "staged"  # one DMA to or from a staging buffer, and CPU threads
    MEMCPY = "memcpy"  # plain copies in memory: a CPU has no link


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkKey:
    """What a calibration is valid for."""

    gpu_name: str
    driver: str
    link: str  # PCIe generation and lanes, as in "gen5x16"
    torch: str
    triton: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkEntry:
    """One way of copying pieces of one size, measured. ``programs`` and ``tile_bytes`` are 0 where
    no kernel copies. ``slowdown``: time of large matrix products with such a copy beside them
    until both are done, over their time alone; None: not measured."""

    direction: Direction
    piece_bytes: int
    path: CopyPath
    programs: int
    tile_bytes: int
    bytes_per_s: float  # of random pieces on an idle machine
    slowdown: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkCalibration:
    """What the link carries, by way and size of the pieces. ``contiguous``: one large DMA each
    way in the same run, the measure of everything else."""

    key: LinkKey
    contiguous: LinkProbe
    entries: tuple[LinkEntry, ...]
    measured_at: float = 0.0  # seconds since the epoch, set by who stores it


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateLink:
    """A calibration to be made by a process of its own. No sizes: the usual ones; ``quick``: few
    ways. ``key`` goes into the result; None for a CPU, which has no link."""

    device: str
    key: LinkKey | None = None
    sizes_bytes: tuple[int, ...] = ()
    quick: bool = False


# Of a daemon: a measurement costs dense attention in one layer. Where steps are queued on a device
# it also waits for it, and pages that are not hot cross the link: seldom, unless there is a floor.
RECALL_STRIDE = 32
QUEUED_RECALL_STRIDE = 256
WATCHED_RECALL_STRIDE = 64
NO_RECALL = 1 << 30  # a stride for measurements, which a sample would be part of


class VerifyMode(StrEnum):
    """How many pages are hashed on both tiers, to find copies that went wrong."""

    OFF = "off"
    SAMPLE = "sample"  # one page row in 64
    FULL = "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What an engine promises, whatever its knobs. ``tpot_s``: time of a token that admission keeps
    to, None: a multiple of a step without misses. ``recall_floor``: attention recall under which a
    request reads more, then everything; 0: never."""

    tpot_s: float | None = None
    recall_floor: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """Everything an engine process is started with; nothing in it is 'auto'."""

    model: str  # a Hugging Face directory, or "dummy:<shape>"
    device: str  # "cpu" or "cuda:N"
    dtype: str  # a key of DTYPE_BYTES
    knobs: Knobs
    plan: MemoryPlan
    seed: int = 0
    enforce_eager: bool = False  # launch every operation of a step, capture no graph
    always_select: bool = False  # even where attending to all tokens in place is faster
    recall_stride: int = RECALL_STRIDE  # steps between two measurements of attention recall
    verify_kv: VerifyMode = VerifyMode.OFF
    look_ahead: bool = False  # fetch a layer early what the layer will probably select
    selection_trace: str | None = None  # a recording whose selections replace the model's own
    link: LinkKey | None = None  # of the device; None for a CPU
    calibration: LinkCalibration | None = None  # None: the engine makes one, unless on a CPU
    service: Service = field(default_factory=Service)
    cache_dir: str | None = None  # where what is learned of a model is kept; None: nowhere
    hbm_free_bytes: int = 0  # of the device, before an engine was on it; 0: not known, or a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFacts:
    """What a loaded engine says of itself."""

    pid: int
    device_name: str
    weights_bytes: int
    load_s: float
    link: LinkProbe
    versions: Mapping[str, str]  # torch, triton, cuda
    copies: tuple[LinkEntry, ...] = ()  # how pages are loaded and saved, and blocks saved
    calibration: LinkCalibration | None = None  # made at this start
    selection_trace: str | None = None  # the recording whose selections are replayed


# --------------------------------------------------------------------------------------------
# Measurements of the engine on an idle machine
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePoint:
    """``requests`` that decode together, each ``tokens`` long in the middle of the measurement."""

    requests: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureDecode:
    """Decode steps of an engine, to be measured by a process of its own."""

    spec: EngineSpec
    points: tuple[DecodePoint, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSpeed:
    """A decode step in its steady state. ``tokens`` is the mean length of the requests then.

    ``graph_ms``: the captured step replayed alone, ``not_hidden_ms``: what a step takes beyond it;
    None where nothing is captured. ``floor_ms``: ``read_bytes`` at the rate of a plain copy in the
    memory of the device, of the same run; ``floor_ratio``: ``step_ms`` over it.
    """

    requests: int
    tokens: int
    step_ms: float
    graph_ms: float | None
    not_hidden_ms: float | None
    read_bytes: int  # weights, and K and V of all requests that a step attends to
    floor_ms: float
    floor_ratio: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeReport:
    """``copy_bytes_per_s``: bytes read and written by a copy. ``skipped``: what does not fit."""

    model: str
    device_name: str
    dtype: str
    knobs: Knobs
    versions: Mapping[str, str]
    copy_bytes_per_s: float
    steps: tuple[DecodeSpeed, ...]
    skipped: tuple[DecodePoint, ...]
    selection_trace: str | None = None  # the recording whose selections were replayed


class Ceiling(StrEnum):
    """What the speed of a kernel is compared with, measured in the same run."""

    COPY = "copy"  # in the memory of the device: bytes read and written per second
    H2D = "h2d"  # one large DMA: bytes per second
    D2H = "d2h"
    MATMUL = "matmul"  # a product of large matrices: FLOP per second


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureKernels:
    """Kernels at the sizes of a model, to be measured by a process of its own. ``contexts`` are
    tokens of each request, ``page_size`` tokens of a page."""

    device: str
    dtype: str
    shape: ModelShape
    page_size: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSpeed:
    """One kernel on inputs of one size. ``rate``: bytes it must move, or FLOP, per second, in the
    unit of its ceiling; ``ratio``: to that. ``time_us`` None: only the rate was measured."""

    kernel: str
    case: str
    time_us: float | None
    rate: float
    ceiling: Ceiling
    ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelReport:
    device_name: str
    dtype: str
    versions: Mapping[str, str]
    ceilings: Mapping[Ceiling, float]
    kernels: tuple[KernelSpeed, ...]
    skipped: tuple[str, ...]  # cases that the device has no memory or no implementation for


# --------------------------------------------------------------------------------------------
# Requests and tokens
# --------------------------------------------------------------------------------------------


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


MAX_PASSING = 16  # waiting requests looked at in a step: none further back is admitted


class WaitReason(StrEnum):
    """Why a request is not in the batch yet."""

    ACTIVE_LIMIT = "active-limit"  # max_num_active_seqs requests run, or all rows are taken
    HOT_TIER = "hot-tier"  # its working set does not fit beside those that run
    DRAM_TIER = "dram-tier"  # no frames for its whole life
    LINK = "link"  # the pages that all would miss take longer than a token may
    TURN = "turn"  # an older request has waited so long that nobody may pass it
    PROMPTS = "prompts"  # prompts before it take up all of prefill_chunk
    SPILLED = "spilled"  # it ran, gave its hot pages to others, and waits to come back


class RefusalReason(StrEnum):
    """Why a request ends without a token: refused by the daemon, or by its engine."""

    INVALID = "invalid"  # a field is wrong
    TOO_LONG = "too-long"  # for max_model_len
    DRAM_TIER = "dram-tier"  # not even alone
    HOT_TIER = "hot-tier"  # not even alone
    QUEUE_FULL = "queue-full"  # as many wait as may; never seen by an engine
    DRAINING = "draining"  # the daemon ends; never seen by an engine


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Temperature 0 is greedy. Seed None: the engine draws one."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids included unless ignore_eos
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; n: the chosen token's and the n best
    prompt_logprobs: int | None = None


class SparseMode(StrEnum):
    AUTO = "auto"
    OFF = "off"


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseOptions:
    """Per-request choice; ``token_budget`` None follows the knob."""

    mode: SparseMode = SparseMode.AUTO
    token_budget: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AddRequest:
    """Start a request. ``generated_tokens`` are fed through decode again before new ones are
    drawn (crash replay), and are not reported a second time."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    sparse: SparseOptions = field(default_factory=SparseOptions)
    generated_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortRequest:
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplyKnobs:
    """Change hot knobs, at a step boundary; the engine answers with KnobsApplied of the same
    ``change_id`` once they are in force, or newer ones in their place."""

    change_id: int
    knobs: Knobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Shutdown:
    """Stop at once; the controller drains before it says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    rank: int  # 1: the most likely token


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseDetails:
    """What sparsity did to one request, over its decode steps. After a crash all figures are of
    the replay, which does every step of the answer again."""

    method: str
    token_budget: int
    decode_steps: int
    sparse_steps: int  # steps that did not read every token
    tokens_read: int  # K/V tokens read per lane, summed over steps
    tokens_dense: int  # what dense attention would have read
    coverage: float | None  # mean attention recall on sampled steps; None if never sampled
    replayed: bool = False  # a recording selected for some of its steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutput:
    """One generated token of one request; the last one carries the reason and the details.

    ``token_id`` None closes a request without a token (abort, error). ``prompt_logprobs`` comes
    with the first output: one entry per prompt token, the first of them None.
    """

    request_id: str
    index: int  # 0 for the first generated token
    token_id: int | None
    logprob: TokenLogprob | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[tuple[TokenLogprob, ...] | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    sparse: SparseDetails | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """All outputs of one engine step."""

    outputs: tuple[TokenOutput, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadProgress:
    phase: str
    frac: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReady:
    facts: EngineFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFailed:
    """The engine could not start or go on; it exits after saying so."""

    message: str
    exit_code: int
    cause: FailureCause = FailureCause.OTHER


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobsApplied:
    """Answer to the ApplyKnobs of that id: the ``knobs`` in force. ``error`` names the knob that was
    refused."""

    change_id: int
    knobs: Knobs
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """Sent every second by a thread of its own. ``step_age_s`` is the age of the step that is
    running, 0 when idle: a stuck step shows although the thread lives."""

    step_id: int
    step_age_s: float


# --------------------------------------------------------------------------------------------
# Telemetry
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyTotal:
    """Copies of one kind since the start. ``seconds`` are those such copies were under way: of
    fetches in CUDA graphs at the rate of those that were timed, of saves in them there are none."""

    direction: Direction
    path: CopyPath
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitCount:
    """How often a request began to wait for this reason."""

    reason: WaitReason
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalCount:
    """Requests ended for this reason."""

    reason: RefusalReason
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitingRequest:
    """A request that is not in the batch; ``waited_s`` since it came."""

    request_id: str
    reason: WaitReason
    waited_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityEvent:
    """The quality breaker changed what a request reads: ``token_budget`` from now on, everything
    where ``is_dense``. ``recall`` is the sample that did it."""

    request_id: str
    recall: float
    token_budget: int
    is_dense: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobProgress:
    """A change of hot knobs that is under way: which, and how much of what it takes is done."""

    names: tuple[str, ...]
    frac: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counters since the engine started (they only grow) and gauges of now."""

    # counters
    steps: int = 0
    step_s: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests_finished: int = 0
    hot_hits: int = 0  # pages
    hot_misses: int = 0  # pages
    foreseen_pages: int = 0  # fetched a layer ahead; selected then, they are hits
    wasted_pages: int = 0  # of these, not selected in their step
    evicted_pages: int = 0  # pages that lost their slot while their request went on
    overflow_pages: int = 0  # selected pages that did not fit their lane, attended in passes
    h2d_bytes: int = 0
    h2d_s: float = 0.0  # fetches inside CUDA graphs as fast as those that were timed
    d2h_bytes: int = 0
    d2h_s: float = 0.0  # without those of saves inside CUDA graphs
    exposed_s: float = 0.0  # in which attention stood still for pages, in the timed steps
    timed_steps: int = 0  # of the steps that fetch: a sample
    copies: tuple[CopyTotal, ...] = ()  # the same by direction and path
    recall_sum: float = 0.0
    recall_samples: int = 0
    verify_checked_pages: int = 0  # looked at again after a copy
    verify_mismatches: int = 0  # of these, not what was saved
    spills: int = 0  # requests that gave up their hot pages while they ran
    restores: int = 0  # and came back
    quality_raises: int = 0  # budgets raised because a sample of recall was low
    quality_dense: int = 0  # requests made dense for that
    waits: tuple[WaitCount, ...] = ()
    refusals: tuple[RefusalCount, ...] = ()
    # gauges
    num_running: int = 0
    num_waiting: int = 0
    num_spilled: int = 0  # of those waiting, requests that have run already
    waiting: tuple[WaitingRequest, ...] = ()  # the oldest ones
    hot_used_bytes: int = 0
    hot_total_bytes: int = 0
    dram_used_bytes: int = 0
    dram_total_bytes: int = 0
    working_set_pages: int = 0  # used in the newest 12 steps of each lane, all requests
    working_set_bytes: int = 0
    metadata_bytes: int = 0  # summaries of pages, of all frames in use
    hbm_peak_bytes: int = 0  # most that this engine has had of the device; 0 on a CPU
    recent_step_s: tuple[float, ...] = ()  # durations of the steps since the last report
    recent_quality: tuple[QualityEvent, ...] = ()  # since the last report
    knobs: Knobs | None = None
    applying: KnobProgress | None = None  # None: the newest knobs are in force


class NvmlFault(StrEnum):
    """Why the driver's library did not answer."""

    NOT_SUPPORTED = "not-supported"  # by this GPU
    NO_PERMISSION = "no-permission"
    NO_FUNCTION = "no-function"  # the driver or the binding is older
    GPU_LOST = "gpu-lost"
    FAILED = "failed"  # anything else, perhaps only this time


class PcieCounter(StrEnum):
    """What the GPU counts the traffic of its link with."""

    GPM = "gpm"  # Hopper and later: a rate between two samples
    FIELDS = "fields"  # bytes since some moment
    THROUGHPUT = "throughput"  # of 20 ms, which misses bursts


class GpuSlowdown(StrEnum):
    """Why the clocks of a GPU are cut. Its power cap is no reason: heavy load reaches that."""

    THERMAL = "thermal"
    POWER_BRAKE = "power-brake"  # the host's power supply asks for it
    HARDWARE = "hardware"  # the board does, without saying why


@dataclass(frozen=True, kw_only=True, slots=True)
class HostGauges:
    """psutil's and NVML's view. None: the source does not exist or did not answer. All are of
    ``read_at``; rates of the link are means of ``pcie_interval_s`` before it."""

    process_rss_bytes: int | None = None  # controller and engine together
    process_cpu_frac: float | None = None  # of one core
    host_cpu_frac: float | None = None  # of all cores
    host_free_bytes: int | None = None
    gpu_used_bytes: int | None = None
    gpu_total_bytes: int | None = None
    gpu_util_frac: float | None = None
    pcie_h2d_bytes_per_s: float | None = None
    pcie_d2h_bytes_per_s: float | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    gpu_own_bytes: int | None = None  # of the engine, as the driver counts it
    gpu_others_bytes: int | None = None  # of all other processes
    read_at: float | None = None  # seconds since the epoch; None: never read
    pcie_counter: PcieCounter | None = None
    pcie_interval_s: float | None = None
    pcie_fault: NvmlFault | None = None  # why there is no rate
    gpu_fault: NvmlFault | None = None  # why there is no memory of the GPU
    gpu_slowdown: GpuSlowdown | None = None  # None: full clocks, or not known


@dataclass(frozen=True, kw_only=True, slots=True)
class HbmUse:
    """Bytes of device memory by owner. The parts of the hot tier are what the planner gave them,
    used or not. None: the driver does not tell which process has what."""

    weights_bytes: int
    hot_pages_bytes: int
    summaries_bytes: int
    tables_bytes: int
    staging_bytes: int
    prefill_buffer_bytes: int
    rest_bytes: int | None  # of the engine: CUDA context, graphs, activations, unused reserve
    others_bytes: int | None  # other processes
    free_bytes: int | None
    peak_bytes: int | None = None  # most that the engine has had in all; None: not told yet


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadContext:
    """What is asked of the engine of late, and what that takes. None: nothing tells.

    The rate and the lengths of prompts are of requests that came, the lengths of outputs of those
    that finished. What follows ``output_tokens_p95`` depends on knobs as well.
    """

    span_s: float  # that the rate and the lengths cover
    num_requests: int  # that came
    requests_per_s: float | None = None
    input_tokens_p50: float | None = None
    input_tokens_p95: float | None = None
    output_tokens_p50: float | None = None
    output_tokens_p95: float | None = None
    concurrency: float | None = None  # requests that run or wait, mean
    hot_hit_frac: float | None = None
    h2d_bytes_per_token: float | None = None  # of output
    h2d_gb_per_s: float | None = None  # while copies were under way, 1e9 bytes/s
    hbm_free_bytes: int | None = None
    attention_recall: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One closed window of the profiler. Rates are over ``window_s``; None: nothing happened in
    the window, so there is no such figure. TTFT and TPOT are of requests finished in it."""

    ended_at: float  # seconds since the epoch
    window_s: float
    steps: int
    step_p50_s: float | None
    step_p95_s: float | None
    step_p99_s: float | None
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    hot_hit_frac: float | None
    misses_per_step: float | None  # pages
    miss_bytes_per_step: float | None
    h2d_bytes: int
    d2h_bytes: int
    h2d_gb_per_s: float | None  # bytes over the seconds copies were under way, 1e9 bytes/s
    d2h_gb_per_s: float | None
    attention_recall: float | None
    num_running: int
    num_waiting: int
    hot_used_frac: float
    dram_used_frac: float
    working_set_pages: int
    working_set_bytes: int
    metadata_bytes: int
    requests_finished: int
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p95_s: float | None = None
    host: HostGauges = field(default_factory=HostGauges)
    knobs: Knobs | None = None
    step_s: float = 0.0  # seconds of the window that were in steps
    selected_pages_per_step: float | None = None  # mean of all steps
    exposed_s_per_step: float | None = None  # waits for pages, of the timed steps of the window
    waiting: tuple[WaitCount, ...] = ()  # of the requests that wait at its end, the oldest ones
    hbm: HbmUse | None = None  # None: not on a GPU
    context: WorkloadContext | None = None  # of this window and those before it
    recall_samples: int = 0  # that ``attention_recall`` is the mean of


class Bound(StrEnum):
    """What takes most of the time, or what runs out first."""

    HBM = "HBM-bound"  # bytes read from the memory of the device
    LINK = "link-bound"  # pages loaded from the DRAM tier
    COMPUTE = "compute-bound"  # products of matrices, those of prompts above all
    LATENCY = "latency-bound"  # small kernels that wait for each other
    HOST = "host-bound"  # the CPU between the steps, or other processes on it
    CAPACITY = "capacity-bound"  # more requests would pay, and do not fit
    IDLE = "idle"  # there is little to do
    UNKNOWN = "unknown"  # figures are missing or too old


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One number that a verdict rests on; shares have the unit "share"."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What binds an engine now. ``share``: of its limit or of the time, as ``reason`` says; None
    where there is no such number. ``age_s``: of the newest window; ``left_out``: figures that were
    too old or absent."""

    bound: Bound
    reason: str
    share: float | None = None
    limit: WaitReason | None = None  # what requests wait for, where CAPACITY or LINK binds
    evidence: tuple[Evidence, ...] = ()
    age_s: float | None = None
    num_windows: int = 0
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the machine carries, as far as a verdict compares with it. None: not known. The
    ``floor_*`` are seconds of a mean step of the windows by bytes and rates alone."""

    num_cpus: int
    is_gpu: bool
    h2d_bytes_per_s: float | None = None  # of pages, as calibrated
    floor_hbm_s: float | None = None
    floor_compute_s: float | None = None
    floor_latency_s: float | None = None


# --------------------------------------------------------------------------------------------
# What knobs do to each other and to what binds
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobMove:
    """A change of a knob that helps where ``bound`` binds, and why; ``limit``: only where requests
    wait for that."""

    bound: Bound
    up: bool
    why: str
    limit: WaitReason | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobGuide:
    """What a knob does to everything else. ``rises`` and ``falls``: with a larger value, or with
    another one where values have no order; ``bounded_by``: beside the range."""

    rises: str
    falls: str
    bounded_by: str
    moves: tuple[KnobMove, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """What would help. ``knob`` None: no knob does; ``up`` None: see ``why``."""

    knob: str | None
    up: bool | None
    why: str


_FEWER_PAGES = "fewer pages are selected, missed and fetched; check attention recall"

KNOB_GUIDES: Mapping[str, KnobGuide] = {
    "token_budget": KnobGuide(
        rises="attention recall, K and V read in a step, pages missed, working sets",
        falls="requests that fit the hot tier",
        bounded_by="at least four pages; at most hbm_budget where that is a number",
        moves=(
            KnobMove(bound=Bound.LINK, up=False, why=_FEWER_PAGES),
            KnobMove(
                bound=Bound.HBM, up=False, why="a step reads less K and V; check attention recall"
            ),
            KnobMove(
                bound=Bound.CAPACITY,
                limit=WaitReason.HOT_TIER,
                up=False,
                why="working sets shrink; check attention recall",
            ),
        ),
    ),
    "hbm_budget": KnobGuide(
        rises="hits of each request, hot tier it holds",
        falls="misses, bytes over the link, requests that run with their pages hot",
        bounded_by="at least token_budget; what the hot tier holds",
        moves=(
            KnobMove(
                bound=Bound.CAPACITY,
                limit=WaitReason.HOT_TIER,
                up=False,
                why="each request holds less of the hot tier, and misses more",
            ),
            KnobMove(bound=Bound.LINK, up=True, why="more of what a request selects stays hot"),
        ),
    ),
    "max_num_active_seqs": KnobGuide(
        rises="requests at once, throughput while tiers and link have room, time of a token",
        falls="queueing",
        bounded_by="max_num_seqs; the gates of both tiers and of the link",
        moves=(
            KnobMove(
                bound=Bound.CAPACITY,
                limit=WaitReason.ACTIVE_LIMIT,
                up=True,
                why="requests wait for a place in the batch while the tiers have room",
            ),
            KnobMove(
                bound=Bound.LINK,
                up=False,
                why="fewer requests share hot tier and link: fewer misses",
            ),
        ),
    ),
    "prefill_chunk": KnobGuide(
        rises="rate of prompts, longest step while a prompt runs, memory of activations",
        falls="TTFT of a request alone, steps of a prompt",
        bounded_by="device memory beside weights and KV",
        moves=(
            KnobMove(
                bound=Bound.COMPUTE,
                up=False,
                why="prompts hold up decoding less: TPOT falls, TTFT rises",
            ),
            KnobMove(
                bound=Bound.HOST, up=True, why="a prompt takes fewer steps, each with its overhead"
            ),
        ),
    ),
    "residency_watermark": KnobGuide(
        rises="room for newcomers and for prompts",
        falls="requests that stay in the hot tier whole, so hits rise less",
        bounded_by="the working sets of those that run",
        moves=(
            KnobMove(
                bound=Bound.LINK,
                up=False,
                why="requests stay whole in the hot tier for longer: fewer misses",
            ),
        ),
    ),
    "copy_programs": KnobGuide(
        rises="rate of loads up to that of the link, disturbance of kernels beside them",
        falls="time that attention waits for pages, until the link is full",
        bounded_by="the link; sparsed bench link shows the rate of each number",
        moves=(
            KnobMove(
                bound=Bound.LINK,
                up=True,
                why="only while loads stay under the rate that sparsed bench link shows",
            ),
        ),
    ),
    "retrieval_stride": KnobGuide(
        rises="tokens that attend to pages chosen for an earlier one",
        falls="ranking, pages missed and fetched, attention recall",
        bounded_by="the page: a request selects anew when one is full",
        moves=(
            KnobMove(
                bound=Bound.LINK,
                up=True,
                why="selections change less often: fewer misses; check attention recall",
            ),
        ),
    ),
    "profiler": KnobGuide(
        rises="what status, why, metrics and the tuner know",
        falls="tokens a second, by what benchmarks/profiler_overhead.py measures",
        bounded_by="nothing",
    ),
    "page_size": KnobGuide(
        rises="rate of the link for each page",
        falls="summaries in the hot tier, precision of the selection",
        bounded_by="token_budget holds at least four pages",
        moves=(
            KnobMove(bound=Bound.LINK, up=True, why="larger pieces cross the link faster"),
            KnobMove(
                bound=Bound.CAPACITY,
                limit=WaitReason.HOT_TIER,
                up=True,
                why="summaries and tables leave more of the hot tier to pages",
            ),
        ),
    ),
    "sparse_method": KnobGuide(
        rises="with a ranking: context that fits, bytes over the link; with dense: recall, to 1",
        falls="with a ranking: K and V read in a step, recall; with dense: requests that fit",
        bounded_by="dense requests lie in the hot tier from end to end",
    ),
    "dense_layers": KnobGuide(
        rises="attention recall, K and V read and fetched",
        falls="requests that fit the hot tier",
        bounded_by="the layers of the model",
        moves=(
            KnobMove(bound=Bound.LINK, up=False, why="fewer layers read all their pages"),
            KnobMove(bound=Bound.HBM, up=False, why="fewer layers read all their K and V"),
        ),
    ),
    "max_num_seqs": KnobGuide(
        rises="requests that may run at once, tables, graphs and rows of logits",
        falls="hot pages, by what these take",
        bounded_by="device memory",
        moves=(
            KnobMove(
                bound=Bound.CAPACITY,
                limit=WaitReason.ACTIVE_LIMIT,
                up=True,
                why="room for a larger max_num_active_seqs",
            ),
        ),
    ),
    "kv_hbm_gib": KnobGuide(
        rises="hits, requests that fit, frames whose summaries have a place",
        falls="misses, device memory for everything else",
        bounded_by="device memory less weights, graphs and activations",
        moves=(
            KnobMove(bound=Bound.LINK, up=True, why="more pages stay hot: fewer misses"),
            *(
                KnobMove(bound=Bound.CAPACITY, limit=limit, up=True, why="more working sets fit")
                for limit in (WaitReason.HOT_TIER, WaitReason.SPILLED)
            ),
        ),
    ),
    "kv_dram_gib": KnobGuide(
        rises="requests and context that the daemon holds at once, pinned memory",
        falls="free memory of the host",
        bounded_by="free DRAM; summaries of its frames in the hot tier",
        moves=(
            KnobMove(
                bound=Bound.CAPACITY,
                limit=WaitReason.DRAM_TIER,
                up=True,
                why="more whole requests have frames",
            ),
        ),
    ),
    "max_model_len": KnobGuide(
        rises="longest request that is taken, frames held for requests without max_tokens",
        falls="requests that fit at once where clients send no max_tokens",
        bounded_by="the positions of the model; frames of the DRAM tier",
    ),
}


# --------------------------------------------------------------------------------------------
# Tuning
# --------------------------------------------------------------------------------------------


class Objective(StrEnum):
    THROUGHPUT = "throughput"  # output tokens per second
    GOODPUT = "goodput"  # requests per second that met the TTFT and TPOT targets
    LATENCY = "latency"  # answers of 256 tokens per second that one reader gets, at the p95
    BALANCED = "balanced"  # geometric mean of throughput and latency
    CAPACITY = "capacity"  # output tokens per second and GiB of the hot tier used at its peak


class SearchMethod(StrEnum):
    """How an offline study searches; random runs beside every other one, at equal budget."""

    CONSTRAINED = "constrained"  # Bayesian, with a model of every target
    SKOPT = "skopt"  # scikit-optimize as it comes
    GRID = "grid"
    RANDOM = "random"


class TrialStatus(StrEnum):
    OK = "ok"
    OUT_OF_MEMORY = "out_of_memory"  # of the device
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    DEVICE_ERROR = "device_error"
    SLO_BROKEN = "slo_broken"
    RECALL_BROKEN = "recall_broken"
    INVALID_CONFIG = "invalid_config"
    TIMEOUT = "timeout"
    ENGINE_ERROR = "engine_error"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """Targets; None: no target. ``min_recall``: the floor of attention recall, mean of the samples."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    min_recall: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadRequest:
    """One request of a workload: sizes in tokens, arrival in seconds from the start.

    ``block_ids`` name the prompt's blocks of 512 tokens from its beginning on: requests whose first
    ids are equal have that prefix in common.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRequest:
    """One request that was served, as sizes in tokens; ``arrival_s`` counts from the beginning of
    the recording. ``block_ids`` as in ``WorkloadRequest``, numbered anew in each recording."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    max_tokens: int
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingPart:
    """What has ended since it was last asked for. ``num_left_out`` counts from the beginning:
    requests that ended without a token, or were cut off. Nothing more comes once it is over."""

    requests: tuple[RecordedRequest, ...]
    num_running: int
    num_left_out: int
    is_over: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    name: str
    requests: tuple[WorkloadRequest, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one run of a workload under one configuration gave. Lists are per request.
    ``hbm_peak_frac``: of the device's memory, everybody's use, as often as the driver was asked;
    ``link_busy_frac``: bytes loaded over what the link carries at its calibrated rate. None: there
    is no GPU, or it does not say."""

    duration_s: float
    output_tokens: int
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    sparse_steps: int  # decode steps, over all requests, that did not read every token
    attention_recall: float | None  # None: never sampled
    hot_hit_frac: float | None
    h2d_bytes: int
    hot_peak_bytes: int
    errors: int = 0
    hbm_peak_frac: float | None = None
    link_busy_frac: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """A configuration and what became of it. ``score`` is the objective, higher is better, None
    when the trial is infeasible; ``spread_frac`` is (max - min) / median over its repeats.
    ``device`` is where it was measured, None in studies of versions that did not keep it."""

    number: int
    arm: str  # "default", "bayes", "skopt", "grid", "random"; earlier versions had "verify"
    values: Mapping[str, KnobValue]
    status: TrialStatus
    score: float | None
    spread_frac: float | None
    metrics: Mapping[str, float]
    reason: str = ""
    device: str | None = None
    started_at: float = 0.0
    ended_at: float = 0.0


class DecisionState(StrEnum):
    """What became of a change that was put to the test. ``held``: nothing was decided, so what
    ran before goes on."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    HELD = "held"


class DecisionReason(StrEnum):
    """Why; those from ``missing_data`` on hold, those between it and ``accepted`` reject."""

    ACCEPTED = "accepted"
    OUTRANKED = "outranked"  # its worst re-measurement is not above the incumbent's
    CANDIDATE_FAILED = "candidate_failed"  # it broke down in a window
    NO_GAIN = "no_gain"  # the gain is not significant
    SMALL_EFFECT = "small_effect"  # significant, and too small to change anything for
    METRIC_WORSE = "metric_worse"  # no gain was asked for, and it is not shown to be no worse
    TTFT_WORSE = "ttft_worse"  # not shown to be no worse; so the next three
    TPOT_WORSE = "tpot_worse"
    ERRORS_WORSE = "errors_worse"
    QUALITY_WORSE = "quality_worse"
    MISSING_DATA = "missing_data"  # a window is absent, doubled, or lacks a figure
    NOT_ENOUGH = "not_enough"  # stopped before the last window
    NOISY = "noisy"


class Guard(StrEnum):
    """Figures of a window that a change must not make worse."""

    TTFT = "ttft_p95_s"
    TPOT = "tpot_p95_s"
    ERRORS = "error_frac"  # of all requests
    QUALITY = "quality"  # attention recall; 1 where every step read every token


class WindowStage(StrEnum):
    RANK = "rank"  # candidates against each other
    TEST = "test"  # the best of them against the incumbent, in pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptanceRule:
    """When a change is accepted. All that a decision depends on beside its windows.

    ``metric``: name of the figure that is to grow. ``num_rounds``: measurements of each
    candidate before the test; 0: there is one candidate. ``num_pairs`` is fixed beforehand,
    fewer decide nothing. ``targets``: of guards; what is better than its target counts as the
    target, so only what misses it is lost. ``max_loss_frac``: by which a guard must be shown to be no worse;
    ``max_error_frac``: the same for the share of requests that are answered. ``max_cv_frac``:
    noise of one window over which nothing is decided; ``takes_sure_gains``: but to accept a gain
    whose lower limit is over that noise. ``needs_gain`` False: ``metric`` is one more guard, and
    need not grow. InputError if no result could pass.
    """

    metric: str = "goodput_requests_per_s"
    guards: tuple[Guard, ...] = tuple(Guard)
    targets: Mapping[Guard, float] = field(default_factory=dict)
    num_rounds: int = 0
    num_pairs: int = 32
    alpha: float = 0.025  # one-sided, of the gain
    guard_alpha: float = 0.05  # one-sided, of each guard
    min_effect_frac: float = 0.01
    max_loss_frac: float = 0.03
    max_error_frac: float = 0.005
    max_cv_frac: float = 0.08
    takes_sure_gains: bool = True
    needs_gain: bool = True

    def __post_init__(self) -> None:
        for name in ("alpha", "guard_alpha"):
            if not 0.5**self.num_pairs < getattr(self, name) < 0.5:
                raise InputError(
                    f"{name}={getattr(self, name)} cannot be reached with {self.num_pairs} pairs: "
                    "give more pairs, or an alpha between 0.5 ** num_pairs and 0.5",
                    field=name,
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptanceWindow:
    """One measurement that a decision rests on. ``metrics`` are raw; None: there is no such
    figure, or it is not a finite number."""

    number: int  # in the order of time, within its decision
    stage: WindowStage
    round: int  # of the ranking; in a test, the pair
    order: int  # which arrival order was served; windows of a pair have the same one
    values: Mapping[str, KnobValue]
    status: TrialStatus
    metrics: Mapping[str, float | None]
    started_at: float = 0.0
    ended_at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptanceVerdict:
    """``hl``, ``ci_lo``, ``ci_hi``: logarithm of the ratio of candidate to incumbent, its
    Hodges-Lehmann estimate and confidence limits at level 1 - 2 alpha. ``cv``: noise of one
    window. All None before the last pair. ``loss_bounds``: for each guard, and for the
    metric where no gain is needed, the upper limit of the logarithm of its loss, at level
    1 - guard_alpha."""

    state: DecisionState
    reason: DecisionReason
    num_pairs: int
    hl: float | None = None
    ci_lo: float | None = None
    ci_hi: float | None = None
    p: float | None = None
    cv: float | None = None
    loss_bounds: Mapping[str, float] = field(default_factory=dict)


class ProfileStatus(StrEnum):
    DRAFT = "draft"
    VERIFIED = "verified"
    STALE = "stale"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileKey:
    """What a profile is valid for."""

    hardware: str  # MachineFacts.fingerprint
    model: str  # model id: served name without machine paths
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A tuned configuration with its evidence. ``values`` holds only knobs that were tuned.

    ``shape``: of the model; None: it was stored by a version that did not keep it. ``seed``: the
    name of a profile that ships with the package, which has no id.
    """

    key: ProfileKey
    values: Mapping[str, KnobValue]
    status: ProfileStatus
    workload: str
    objective: Objective
    default_scores: tuple[float, ...] = ()
    winner_scores: tuple[float, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    created_at: float = 0.0
    pinned: bool = False
    profile_id: int | None = None  # set by the store
    shape: ModelShape | None = None
    seed: str | None = None

    @property
    def name(self) -> str:
        """As users give it."""
        return self.seed or (f"#{self.profile_id}" if self.profile_id else "")

    @property
    def gain_frac(self) -> float | None:
        """Median of the winner over the median of the default, minus one."""
        if not self.default_scores or not self.winner_scores:
            return None
        default = sorted(self.default_scores)[len(self.default_scores) // 2]
        winner = sorted(self.winner_scores)[len(self.winner_scores) // 2]
        return winner / default - 1.0 if default > 0 else None


class MatchLevel(StrEnum):
    """How far a profile is good for a machine and a model, the best first."""

    EXACT = "exact"  # the same hardware, model, dtype and versions: used as it is
    COMPATIBLE = "compatible"  # other versions, stale or shipped: to be proved before it is used
    TRANSFER = "transfer"  # other hardware, model or dtype: a search may begin from it
    NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileMatch:
    """``why``: what differs, in words. ``distance``: root of the summed squares of the octaves
    between the two platforms; 0 between equal ones."""

    level: MatchLevel
    why: str
    distance: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class UnprovedProfile:
    """What a start left out of a compatible profile, for the live tuner to prove. ``name``: of the
    profile, with the versions that it is to be proved on; ``values``: the knobs that it sets
    otherwise than the start; ``why``: what differs from where it was measured, in words."""

    name: str
    values: Mapping[str, KnobValue]
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptanceDecision:
    """Whether ``config_to`` may take the place of ``config_from``, with all its evidence: rule and
    windows give the verdict again."""

    key: ProfileKey
    config_from: Mapping[str, KnobValue]
    config_to: Mapping[str, KnobValue]
    rule: AcceptanceRule
    verdict: AcceptanceVerdict
    windows: tuple[AcceptanceWindow, ...]
    initiated_by: str
    decided_at: float
    study_id: int | None = None
    decision_id: int | None = None  # set by the store


class TunerMode(StrEnum):
    """``auto`` alone changes knobs by itself, one tested candidate at a time."""

    OFF = "off"
    OBSERVE = "observe"
    ADVISE = "advise"
    AUTO = "auto"


class RolloutState(StrEnum):
    """Of one candidate of the live tuner. ``expired``: it ended without a verdict on it."""

    ACTIVE = "active"  # proposed, not applied yet
    VERIFYING = "verifying"  # in its paired windows, then on probation
    SUCCESS = "success"
    REVERTED = "reverted"
    EXPIRED = "expired"


class RolloutReason(StrEnum):
    PROPOSED = "proposed"
    CANARY = "canary"
    COMMITTED = "committed"  # it passed the paired test: the last known good from now on
    PROBATION_PASSED = "probation_passed"
    REGIME_SWITCHED = "regime_switched"  # values that were verified for the load of now
    # faults of the candidate: its region is quarantined, the cool-down doubles
    CRASHED = "crashed"  # the daemon died while it was tested
    ENGINE_DIED = "engine_died"
    OUT_OF_MEMORY = "out_of_memory"
    SLO_BREACH = "slo_breach"
    ERRORS = "errors"
    QUEUE_GROWTH = "queue_growth"
    HBM_OVER_LIMIT = "hbm_over_limit"
    NOT_BETTER = "not_better"  # rejected by the paired test
    REGRESSED = "regressed"  # on probation
    APPLY_FAILED = "apply_failed"
    # ends that are no fault of it
    UNDECIDED = "undecided"  # held by the paired test
    NO_TRAFFIC = "no_traffic"
    STALE_DATA = "stale_data"
    BUDGET_SPENT = "budget_spent"  # of exploring, or of breached targets
    OVERTAKEN = "overtaken"  # an operator set knobs meanwhile
    REJECTED = "rejected"  # by an operator
    PINNED = "pinned"
    FROZEN = "frozen"
    KILLED = "killed"
    SWITCHED_OFF = "switched_off"  # the mode does not allow it any more
    STORE_FAILED = "store_failed"
    SHUT_DOWN = "shut_down"
    WAITED_TOO_LONG = "waited_too_long"
    REGIME_CHANGED = "regime_changed"  # the load became another one
    PLATFORM_DRIFT = "platform_drift"  # what was measured on this machine holds no more


# A step of the one or the other is a verdict on its candidate.
VERDICT_STATES = (RolloutState.SUCCESS, RolloutState.REVERTED)
VERDICT_REASONS = (RolloutReason.COMMITTED, RolloutReason.REJECTED)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRecord:
    """One step of the life of one candidate. ``config_from`` and ``config_to`` hold the knobs that
    it changes; times are seconds since the epoch. ``regime_id``: of the load that it was for, None
    where that was not known. ``profile``: name of the ``UnprovedProfile`` whose values they are,
    empty if they are of none."""

    state: RolloutState
    reason: RolloutReason
    config_from: Mapping[str, KnobValue]
    config_to: Mapping[str, KnobValue]
    initiated_by: str
    at: float
    regime_id: int | None = None
    profile: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastKnownGood:
    """Hot knobs that the live tuner has proved better than what a start takes without it, or of
    a compatible profile no worse.
    ``versions``: of what they were proved on, empty where that was not kept."""

    values: Mapping[str, KnobValue]
    moved_at: float
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """A kind of load that a machine and a model have met. ``regime_id`` counts from 1.

    ``centroid``: binary logarithms of fields of ``WorkloadContext``, by name; ``signature``: the
    same in words. ``incumbent``: hot knobs that a paired test has accepted under this load, empty
    without one; ``versions``: of what it was accepted on.
    """

    regime_id: int
    centroid: Mapping[str, float]
    signature: str
    seen_s: float  # altogether
    seen_at: float  # last
    incumbent: Mapping[str, KnobValue] = field(default_factory=dict)
    verified_at: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """What measurements of this machine rest on, as far as it can change while it serves. None:
    not known. ``h2d_bytes_per_s``: of pages, as calibrated."""

    pcie_generation: int | None = None
    pcie_width: int | None = None
    h2d_bytes_per_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TunerControls:
    """What operators laid down for the live tuner, kept over restarts. ``pins``: knobs that it
    leaves alone. ``safe_since``: when safe mode began, None if it has not."""

    pins: tuple[str, ...] = ()
    frozen: bool = False
    safe_since: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TunerRun:
    """A time of serving with values of the live tuner. ``alive_at``: when it was last seen;
    ``ended`` False in a store that is opened anew: it crashed."""

    run_id: int
    started_at: float
    alive_at: float
    ended: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Advice of the live tuner. In mode ``auto`` it becomes a candidate, which is tested."""

    made_at: float
    values: Mapping[str, KnobValue]
    reason: str
    predicted_score: float | None
    current_score: float | None


# --------------------------------------------------------------------------------------------
# Evaluation: how pages are chosen, and what that costs in quality
# --------------------------------------------------------------------------------------------


class RankMethod(StrEnum):
    """What a ranking of pages goes by. ``oracle`` is the true attention of the step, ``random``
    nothing at all: the two ends. ``dense`` ranks nothing and reads everything."""

    DENSE = "dense"
    ORACLE = "oracle"
    RANDOM = "random"
    CUBOID_MEAN = "cuboid-mean"
    QUEST = "quest"
    MEAN = "mean"
    MEAN_SPREAD = "mean-spread"  # mean key +- standard deviation of each dimension
    VARIANCE = "variance"  # mean key, and the variance of q.k that the spread of keys implies
    EVERY_KEY = "every-key"  # all keys, in few dimensions
    CLUSTERS = "clusters"  # of like keys, wherever they stand, by their centre
    GATE = "gate"  # a learned map of pooled keys and of the query


class GroupRule(StrEnum):
    """How the query heads that share a KV head agree. ``mean`` and ``max`` are of estimated
    logits, ``softmax-*`` of the shares of attention that they imply for each head; with ``quota``
    the heads take turns, each with its own best."""

    MEAN = "mean"
    MAX = "max"
    SOFTMAX_SUM = "softmax-sum"
    SOFTMAX_MAX = "softmax-max"
    QUOTA = "quota"


class BudgetRule(StrEnum):
    """Whether all lanes read the same, or what a calibration gave each layer or KV head."""

    EQUAL = "equal"
    LAYER = "layer"
    HEAD = "head"


class MetadataFormat(StrEnum):
    """What the numbers of a summary are kept in; integers and fp8 with a float16 scale a
    unit."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


def _is_power_of_two(value: int) -> bool:
    return value > 0 and not value & (value - 1)


_CHOICE_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {  # of values but None
    "share": (lambda x: 0 < x <= 1, "more than 0, at most 1"),
    "page_size": (lambda x: x in PAGE_SIZES, "one of " + ", ".join(map(str, PAGE_SIZES))),
    "grain": (
        lambda x: x >= 4 and _is_power_of_two(int(x)),
        "powers of two from 4 to the page size",
    ),
    "kept_dims": (lambda x: x >= 1, "1 or more"),
    "variance_weight": (lambda x: isfinite(x) and x >= 0, "0 or more"),
    "dense_layers": (lambda x: x >= 0, "0 or more"),
    "super_pages": (
        lambda x: x == 0 or (_is_power_of_two(int(x)) and x <= 1024),
        "0 or a power of two up to 1024",
    ),
    "coarse": (lambda x: isfinite(x) and x >= 1, "1 or more"),
    "estimated": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "sink_pages": (lambda x: x >= 0, "0 or more"),
    "recent_pages": (lambda x: x >= 0, "0 or more"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Which tokens decode attends to: the pages ranked best, the first ``sink_pages``, the newest
    ``recent_pages`` full ones and the partial one.

    ``share``: tokens read over tokens of the context, the mean over all layers. ``grain``: tokens
    of a unit that is ranked, where pages are cut finer for that; a page ranks by its best unit.
    ``variance_weight``: of the second term of ``variance``; 1 is right for keys that are normal.
    ``kept_dims``: of keys in a basis of their own (None: as they are). ``super_pages``: only the
    pages inside the best runs of so many neighbours are ranked, as many runs as hold ``coarse``
    times what is read (0: all pages are). ``estimated``: share of the context whose attention is
    estimated from summaries instead of dropped. Errors: InputError naming the field that is out of
    its range.
    """

    method: RankMethod
    share: float = 1 / 16
    page_size: int = 32
    grain: int | None = None
    group_rule: GroupRule = GroupRule.MEAN
    metadata: MetadataFormat = MetadataFormat.BF16
    kept_dims: int | None = None
    variance_weight: float = 0.5
    budgets: BudgetRule = BudgetRule.EQUAL
    dense_layers: int = 0
    super_pages: int = 0
    coarse: float = 4.0
    estimated: float = 0.0
    sink_pages: int = 1
    recent_pages: int = 1

    def __post_init__(self) -> None:
        for name, (is_allowed, words) in _CHOICE_RANGES.items():
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise InputError(f"{name}={value}: allowed: {words}", field=name)
        if self.grain is not None and self.grain > self.page_size:
            raise InputError(
                f"grain={self.grain} is more than page_size={self.page_size}; allowed: powers of "
                "two from 4 to the page size",
                field="grain",
            )

    def __str__(self) -> str:
        return self.written()

    def written(self, *, share: bool = True) -> str:
        """What ``--choice`` of ``sparsed eval`` reads as the same choice; ``share`` False leaves
        that out."""
        is_default = self == replace(MEAN_KEY, share=self.share)
        changed = [
            f"{f.name}={_written(f.name, getattr(self, f.name))}"
            for f in fields(self)
            if f.name not in ("method", "share") and getattr(self, f.name) != f.default
        ]
        has_share = share and self.method is not RankMethod.DENSE
        shares = [f"share={format_share(self.share)}"] if has_share else []
        rest = ",".join(shares if is_default else shares + changed)
        name = SparseMethod.MEAN_KEY if is_default else self.method
        return f"{name}:{rest}" if rest else str(name)


def format_share(share: float) -> str:
    """As a fraction where one with a small denominator is exactly it."""
    near = Fraction(share).limit_denominator(_MAX_DENOMINATOR)
    return str(near) if near.numerator / near.denominator == share else repr(share)


def _written(name: str, value: object) -> str:
    return format_share(value) if name == "estimated" and isinstance(value, float) else str(value)


_MAX_DENOMINATOR = 4096
MEAN_KEY = Choice(  # as an engine ranks by default; see engine/sparse/mean_key.py
    method=RankMethod.MEAN,
    page_size=8,
    group_rule=GroupRule.SOFTMAX_SUM,
    metadata=MetadataFormat.INT4,
    kept_dims=40,
    recent_pages=8,
)


RESIDENCIES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # resident pages per selected page
WARMUP_STEPS = 32  # not counted: an empty cache says nothing about the selections
WINDOW_STEPS = 12
WORST_FRAC = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Locality:
    """Shares are of all pages selected after the warm-up, in every lane."""

    num_steps: int  # after the warm-up, of all texts
    overlap_frac: float  # selected in the step before as well
    window_ratio: float  # distinct pages of the newest 12 steps per page of the newest one
    first_touch_frac: float  # never selected before: misses at any residency
    miss_fracs: tuple[float, ...]  # of an exact LRU, at each of RESIDENCIES
    worst_miss_frac: float  # at 4x: 1 % of the steps, all lanes together, miss more than this


class CachePolicy(StrEnum):
    """Which page of a lane gives way to a missing one."""

    LRU = "lru"  # the least recently used; of one step, the lower id
    BUCKETED = "bucketed"  # ages in whole steps, from 63 on alike; of one age, the lower slot
    BELADY = "belady"  # the one whose next use is furthest: the bound of every policy


class QuotaRule(StrEnum):
    """Who holds how many of the slots of a request."""

    EQUAL = "equal"
    UNEVEN = "uneven"  # each lane by what further slots saved it in the first half of the steps


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStudy:
    """What to simulate: every policy at every residency. UNEVEN runs EQUAL beside it."""

    page_size: int
    token_budget: int  # the partial last page included, which needs a slot of its own
    policies: tuple[CachePolicy, ...] = tuple(CachePolicy)
    residencies: tuple[float, ...] = RESIDENCIES
    quotas: QuotaRule = QuotaRule.EQUAL
    prefetch_pages: int = 0  # the next ones of the ranking, brought in after each step

    def __post_init__(self) -> None:
        if not self.policies:
            raise InputError("no policy is given; give at least one", field="policy")
        if not self.residencies or not all(isfinite(one) and one >= 1 for one in self.residencies):
            raise InputError(
                "residency must be numbers from 1 up, at least one: a lane holds what it selects",
                field="residency",
            )
        if self.prefetch_pages < 0:
            raise InputError("prefetch must be 0 or more pages", field="prefetch")

    @property
    def selected_pages(self) -> int:
        """Full pages of a lane's selection."""
        return self.token_budget // self.page_size - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRow:
    """One cache. Shares are of all pages selected in the counted steps, in every lane."""

    policy: CachePolicy
    quotas: QuotaRule
    residency: float
    slots: int  # of all lanes of the recording
    min_slots: int  # of a lane
    max_slots: int
    miss_frac: float  # fetched on demand
    worst_miss_frac: float  # 1 % of the steps, all lanes together, miss more than this
    prefetched_frac: float  # fetched ahead; Belady never does
    used_frac: float | None  # of these, selected before they were evicted; None without any


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheReport:
    """Rows of one residency stand together, in the order of the policies."""

    study: CacheStudy
    num_lanes: int
    num_steps: int  # counted, of all recordings
    first_steps: tuple[int, ...]  # the first one counted of each recording
    mean_selected_pages: float  # of a lane in a step
    overlap_frac: float  # selected in the step before as well
    window_ratio: float  # distinct pages of the newest 12 steps per page of the newest one
    first_touch_frac: float  # never selected before: only a prefetch saves these misses
    rows: tuple[CacheRow, ...]
    uneven_slots: Mapping[str, tuple[int, ...]]  # of each lane, by residency


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """A race of choices, to be run by a process of its own. ``texts``: names of built-in texts or
    files; ``needles``: of each length and depth (0: none); ``calibration``: a file that is read,
    or made from other parts of the texts and written if ``calibrate``."""

    model: str
    cache_dir: str
    device: str
    dtype: str
    choices: tuple[Choice, ...]
    texts: tuple[str, ...]
    context_tokens: int
    scored_tokens: int
    num_windows: int
    needles: int = 0
    needle_depths: int = 8
    calibration: str | None = None
    calibrate: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """One choice on one text. ``ratio``: perplexity over that of dense attention; its interval of
    95 % is a bootstrap over blocks of tokens, each paired with itself under dense. ``reads``: tokens whose K
    and V were read over tokens of the context, the mean over all layers. ``metadata_bytes``: per
    token of the context, all lanes. ``recall``: share of dense softmax mass on what was attended
    to, over sparse layers, query heads and positions; ``error``: distance of the output of
    attention from the dense one over its length. Recall and error are None for dense."""

    text: str
    choice: Choice
    num_tokens: int
    perplexity: float
    ratio: float
    ratio_low: float
    ratio_high: float
    reads: float
    metadata_bytes: float
    recall_mean: float | None = None
    recall_p10: float | None = None
    recall_p01: float | None = None
    error_mean: float | None = None
    recall_by_head: tuple[tuple[float, ...], ...] = ()  # by sparse layer and query head
    locality: Locality | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleScore:
    """How many numbers hidden at ``depth`` (a share of the context) of ``length`` tokens one
    choice gave back, every token of them being the likeliest."""

    choice: Choice
    length: int
    depth: float
    num_found: int
    num_asked: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """What a race found; ``seconds`` by part of the work."""

    model: str
    device_name: str
    dtype: str
    versions: Mapping[str, str]
    context_tokens: int
    scored_tokens: int
    num_windows: int
    quality: tuple[Quality, ...]
    needles: tuple[NeedleScore, ...]
    seconds: Mapping[str, float]
