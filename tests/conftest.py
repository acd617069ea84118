"""Checkpoints that many tests share: tiny random ones of every family, and one real model."""

from __future__ import annotations

import os

# Before anything imports torch: idle OpenMP threads must sleep, not spin beside other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Gaussian processes of a few points are slower with every further thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub for anything

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Machines are slow at times; no property is about that.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TinyCheckpoint = Callable[..., Path]

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # far from uniform logits, so that greedy tokens mean something
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """``tiny_checkpoint(family, rope="default", **config_overrides)`` -> a Hugging Face directory
    of random float32 weights, made once per session and set of arguments; do not change it."""
    made: dict[str, Path] = {}

    def make(family: str, rope: str = "default", **overrides: Any) -> Path:
        key = repr((family, rope, sorted(overrides.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{rope}")
            _save_checkpoint(directory, family=family, rope=rope, overrides=overrides)
            made[key] = directory
        return made[key]

    return make


def _save_checkpoint(directory: Path, *, family: str, rope: str, overrides: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # yarn's remarks on factors that are chosen on purpose
    values = _SIZES | {"rope_parameters": _ROPES[rope] | {"rope_theta": 5000.0}}
    if family == "mistral":
        values["sliding_window"] = None
    config = AutoConfig.for_model(family, **(values | overrides))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # transformers makes them all 0 or all 1
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, fetched once into a cache.

    The cache is ``$SPARSED_TEST_CACHE``, else ``~/.cache/sparsed``. Without it and without a
    network the tests that need real weights fail and say so.
    """
    from sparsed.core import InputError
    from sparsed.engine.models.catalog import fetch_builtin

    cache_dir = Path(os.environ.get("SPARSED_TEST_CACHE", "~/.cache/sparsed")).expanduser()
    try:
        return fetch_builtin("smollm2-135m", cache_dir=cache_dir, progress=lambda *_: None)
    except InputError as error:
        pytest.fail(f"tests on real weights need the network once: {error}", pytrace=False)
