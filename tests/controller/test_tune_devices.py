"""Which devices a study may have, and what each of their engines is started with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import pytest

from sparsed.controller.bench_pool import BenchPool
from sparsed.controller.bench_thread import BenchThread, stop_all
from sparsed.controller.cli.main import run
from sparsed.controller.config import DaemonConfig
from sparsed.controller.startup import prepare
from sparsed.controller.time_budget import TimeBudget
from sparsed.controller.trials import EngineBench
from sparsed.controller.tune_devices import prepare_places, split_devices
from sparsed.core import GIB, InputError, MachineFacts, Measurement, TrialStatus, Workload
from sparsed.tuner.objective import OutOfTime, TrialFailed

H100 = MachineFacts(
    cpu_name="any",
    num_cpus=16,
    dram_total_bytes=128 * GIB,
    dram_free_bytes=120 * GIB,
    gpu_name="H100",
    num_gpus=3,
    hbm_total_bytes=80 * GIB,
    hbm_free_bytes=78 * GIB,
    driver_version="1",
)
MEASURED = Measurement(
    duration_s=1.0,
    output_tokens=1,
    ttft_s=(0.1,),
    tpot_s=(0.1,),
    sparse_steps=0,
    attention_recall=None,
    hot_hit_frac=None,
    h2d_bytes=0,
    hot_peak_bytes=0,
)


@pytest.mark.parametrize("given", ["auto", "cpu", "cuda", "cuda:3", "tpu"])
def test_one_device_is_left_to_the_configuration(given: str) -> None:
    assert split_devices(given) == (given,)


def test_a_list_of_gpus_is_split() -> None:
    assert split_devices("cuda:0, cuda:1,cuda:12") == ("cuda:0", "cuda:1", "cuda:12")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("cpu,cpu", "'cpu' may not stand in a list"),
        ("cuda:0,cpu", "'cpu' may not stand in a list"),
        ("cuda,cuda:1", "by their numbers"),
        ("auto,cuda:1", "by their numbers"),
        ("cuda:0,", "'' may not stand"),
        ("cuda:1,cuda:01", "twice"),
    ],
)
def test_what_may_not_be_listed_is_refused_by_the_flag(
    given: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        split_devices(given)
    assert caught.value.field == "device"
    state = str(tmp_path / "state")
    assert run(["tune", "dummy:tiny", "--device", given, "--state-dir", state]) == 64
    assert f"--device {given}: " in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``machine(0=facts, ...)``: what the driver says of each GPU of this host."""

    def have(*gpus: MachineFacts) -> None:
        def read(*, gpu_index: int = 0) -> MachineFacts:
            return gpus[gpu_index]

        monkeypatch.setattr("sparsed.controller.startup.read_machine", read)

    return have


def places(config: DaemonConfig, *devices: str) -> Any:
    return prepare_places(config, devices, progress=lambda phase, frac: None)


def test_every_device_gets_the_same_knobs_and_its_part_of_the_host(
    machine: Callable[..., None], configure: Callable[..., DaemonConfig]
) -> None:
    machine(H100, replace(H100, hbm_free_bytes=40 * GIB))
    config = configure(model="dummy:llama-3.1-8b", device="auto", kv_hbm_gib=None, kv_dram_gib=None)
    first, second = places(config, "cuda:0", "cuda:1")
    assert (first.plan.spec.device, second.plan.spec.device) == ("cuda:0", "cuda:1")
    assert (first.config.device, second.config.device) == ("cuda:0", "cuda:1")
    assert first.plan.spec.knobs == second.plan.spec.knobs
    assert first.plan.spec.plan == second.plan.spec.plan
    assert first.plan.spec.knobs.kv_hbm_gib < 40
    alone = prepare(replace(config, device="cuda:1"), progress=lambda phase, frac: None)
    assert first.plan.spec.knobs.kv_hbm_gib == alone.spec.knobs.kv_hbm_gib
    assert 2 * first.plan.spec.knobs.kv_dram_gib == pytest.approx(0.8 * 120)
    assert alone.spec.knobs.kv_dram_gib == pytest.approx(0.8 * 120)


def test_another_gpu_is_refused_with_the_flag_and_the_remedy(
    machine: Callable[..., None], configure: Callable[..., DaemonConfig]
) -> None:
    machine(H100, replace(H100, gpu_name="H200", hbm_total_bytes=141 * GIB))
    config = configure(device="auto", kv_hbm_gib=None)
    with pytest.raises(InputError, match=r"--device: cuda:1 is another GPU .*one kind") as caught:
        places(config, "cuda:0", "cuda:1")
    assert caught.value.field == "device"
    assert places(config, "cuda:1")[0].plan.machine.gpu_name == "H200"


def test_pools_that_do_not_fit_the_host_together_are_refused(
    machine: Callable[..., None], configure: Callable[..., DaemonConfig]
) -> None:
    machine(H100, H100, H100)
    config = configure(model="dummy:llama-3.1-8b", device="auto", kv_hbm_gib=None, kv_dram_gib=60)
    assert len(places(config, "cuda:0", "cuda:2")) == 2
    with pytest.raises(InputError, match="the tiers of 3 engines would take 180 of 128"):
        places(config, "cuda:0", "cuda:1", "cuda:2")


class ScriptedBench:
    """An ``EngineBench`` whose windows last until ``gate`` opens."""

    def __init__(self, device: str = "cuda:0") -> None:
        self.device = device
        self.gate = threading.Event()
        self.began: SimpleQueue[int] = SimpleQueue()
        self.num_closed = 0
        self.num_cancelled = 0
        self.error: BaseException | None = None

    async def measure(self, values: Any, *, order: int, **_others: Any) -> Measurement:
        self.began.put(order)
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return MEASURED

    async def close(self) -> None:
        self.num_closed += 1


def thread_of(bench: ScriptedBench, *, max_s: float | None = None) -> BenchThread:
    return BenchThread(cast("EngineBench", bench), budget=TimeBudget(max_s))


@pytest.fixture
def pair() -> Any:
    benches = (ScriptedBench("cuda:0"), ScriptedBench("cuda:1"))
    threads = tuple(thread_of(bench) for bench in benches)
    yield benches, threads
    stop_all(threads)
    for thread in threads:
        thread.close()


def pool_of(threads: Any) -> BenchPool:
    return BenchPool(
        threads,
        workload=Workload(name="none", requests=()),
        deadline_s=60.0,
        on_begin=lambda: None,
    )


def test_windows_end_in_the_order_in_which_they_do(pair: Any) -> None:
    (first, second), threads = pair
    pool = pool_of(threads)
    assert pool.devices == ("cuda:0", "cuda:1")
    pool.begin(0, {}, order=0)
    pool.begin(1, {}, order=0)
    second.gate.set()
    assert pool.next_end() == (1, MEASURED)
    first.error = TrialFailed("so", status=TrialStatus.OUT_OF_MEMORY)
    first.gate.set()
    place, failed = pool.next_end()
    assert place == 0 and failed is first.error
    first.error = RuntimeError("a bug")
    pool.begin(0, {}, order=0)
    with pytest.raises(RuntimeError, match="a bug"):
        pool.next_end()


def test_all_windows_that_are_given_up_end_with_their_engines(pair: Any) -> None:
    (first, second), threads = pair
    pool = pool_of(threads)
    for place, bench in enumerate((first, second)):
        pool.begin(place, {}, order=place)
        assert bench.began.get(timeout=30) == place
    pool.end_all()
    assert (first.num_cancelled, second.num_cancelled) == (1, 1)
    assert (first.num_closed, second.num_closed) == (1, 1)
    second.gate.set()
    pool.begin(1, {}, order=7)
    assert pool.next_end() == (1, MEASURED)
    pool.leave_only(1)
    assert (first.num_closed, second.num_closed) == (2, 1)


def test_work_that_is_cancelled_from_within_is_told(pair: Any) -> None:
    (first, _), threads = pair
    pool = pool_of(threads)
    first.error = asyncio.CancelledError()
    first.gate.set()
    pool.begin(0, {}, order=0)
    place, failed = pool.next_end()
    assert place == 0 and isinstance(failed, TrialFailed)
    assert failed.status is TrialStatus.ENGINE_ERROR and "cuda:0" in str(failed)


def test_the_end_of_time_is_told_once_the_engine_is_gone() -> None:
    bench = ScriptedBench()
    thread = thread_of(bench, max_s=0.05)
    pool = pool_of((thread,))
    pool.begin(0, {}, order=0)
    with pytest.raises(OutOfTime):
        pool.next_end()
    assert bench.num_closed == 1
    stop_all((thread,))
    thread.close()


def test_an_engine_ends_although_whoever_ended_it_is_given_up(
    configure: Callable[..., DaemonConfig],
) -> None:
    class SlowToStop:
        stopped = False

        async def stop(self, timeout_s: float) -> None:
            await asyncio.sleep(0.05)
            self.stopped = True

    config, supervisor = configure(), SlowToStop()
    plan = prepare(config, progress=lambda phase, frac: None)
    bench = EngineBench(config, plan, prompts=cast("Any", None))
    bench._supervisor = cast("Any", supervisor)

    async def scenario() -> None:
        closing = asyncio.create_task(bench.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing})
        assert closing.cancelled() and not supervisor.stopped
        await bench.close()
        assert supervisor.stopped

    asyncio.run(scenario())
