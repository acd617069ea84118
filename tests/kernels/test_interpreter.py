"""The kernels give what their twins give, without a GPU: Triton's interpreter on tiny shapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "interpreted.py",
        "interpreted_resolve.py",
        "interpreted_mean_keys.py",
        "interpreted_selected.py",
    ],
)
def test_every_kernel_equals_its_twin(name: str) -> None:
    # The interpreter must be chosen before triton is first imported: a process of its own.
    suite = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
