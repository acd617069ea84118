"""The real daemon, as a process of its own."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
FIRST_PORT, LAST_PORT = 20_000, 32_000  # below those of outgoing connections
MAX_PROCESSES = 128  # of a parallel run
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """A running ``sparsed start``. ``log`` holds what it wrote to both streams."""

    process: subprocess.Popen[bytes]
    url: str
    state_dir: Path
    log: Path

    def client(self, *, api_key: str = "none", max_retries: int = 0) -> openai.OpenAI:
        """A new client of the OpenAI library; close it, or use it as a context."""
        return openai.OpenAI(api_key=api_key, base_url=f"{self.url}/v1", max_retries=max_retries)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    def wait_until_ready(self, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return when requests are taken; fail with the log if the daemon ends or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"the daemon did not become ready:\n{self.log.read_text()}")
            time.sleep(0.1)

    def stop(self) -> int:
        """SIGTERM; returns the exit code. Harmless when it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"the daemon did not stop:\n{self.log.read_text()}")


StartDaemon = Callable[..., Daemon]


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Finds a TCP port that nobody uses now.

    Each process of a parallel run has ports of its own, no port comes twice, and the system gives
    none of them to outgoing connections: it is still free when a daemon takes it, seconds later.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(FIRST_PORT + process, LAST_PORT, MAX_PROCESSES)
    start = random.randrange(len(ports))  # other runs on this machine begin elsewhere
    candidates = iter((*ports[start:], *ports[:start]))

    def find() -> int:
        return next(port for port in candidates if _is_free(port))

    return find


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytest's own, but short whatever the test is called: unix sockets have 107 bytes."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="module")
def daemon(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[StartDaemon]:
    """``daemon(*flags, model="dummy:tiny", wait=True)`` starts one; all are stopped in the end.

    ``state_dir`` may be given to start again on the same state. With ``wait=False`` the daemon
    may still be starting, or may have failed to.
    """
    running: list[Daemon] = []

    def start(
        *flags: str,
        model: str = "dummy:tiny",
        state_dir: Path | None = None,
        port: int | None = None,
        wait: bool = True,
    ) -> Daemon:
        state_dir = state_dir or tmp_path_factory.mktemp("d")  # short: sockets have 108 bytes
        port = port or free_port()
        log = tmp_path_factory.mktemp("log") / "daemon.log"
        command = [sys.executable, "-m", "sparsed", "start", "--model", model, "--device", "cpu"]
        command += ["--state-dir", str(state_dir), "--port", str(port)]
        command += ["--recall-floor", "0", *flags]  # random weights attend to everything alike
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | QUIET,
            )
        url = f"http://127.0.0.1:{port}"
        running.append(Daemon(process=process, url=url, state_dir=state_dir, log=log))
        if wait:
            running[-1].wait_until_ready()
        return running[-1]

    yield start
    for started in running:
        started.stop()
