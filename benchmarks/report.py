"""What every benchmark needs: the model, texts, and where and with what it ran."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from sparsed.core import GIB, MachineFacts
from sparsed.engine.evaluate.texts import load_tokenizer, read_tokens
from sparsed.engine.models.catalog import resolve_model
from sparsed.engine.models.config import ModelConfig, load_config
from sparsed.engine.models.dummy import DUMMY_PREFIX, dummy_config

PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenizers")


def cache_directory() -> Path:
    """Where models and texts are kept between runs."""
    return Path(os.environ.get("SPARSED_TEST_CACHE", Path.home() / ".cache" / "sparsed"))


def resolve_builtin() -> Path:
    """Directory of the built-in model, fetched once."""
    resolved = resolve_model(
        "smollm2-135m", cache_dir=cache_directory(), progress=lambda phase, frac: None
    )
    assert resolved.path is not None
    return resolved.path


def model_config(model: str) -> ModelConfig:
    """Of ``dummy:SHAPE`` or of a directory."""
    return dummy_config(model) if model.startswith(DUMMY_PREFIX) else load_config(Path(model))


def reference_tokens(directory: Path) -> list[int]:
    """Technical documentation: Python's own reference text, which every Python carries."""
    tokenizer = load_tokenizer(directory)
    return read_tokens("documentation", tokenizer=tokenizer, cache_dir=cache_directory())


def this_machine() -> MachineFacts:
    """The machine as the planner sees it, without a GPU."""
    memory = psutil.virtual_memory()
    return MachineFacts(
        cpu_name=platform.processor() or platform.machine(),
        num_cpus=os.cpu_count() or 1,
        dram_total_bytes=memory.total,
        dram_free_bytes=max(memory.available, 8 * GIB),
    )


def environment() -> dict[str, object]:
    """Command, commit, machine and versions, for the result file."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip() or "unknown",
        "device": device_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
