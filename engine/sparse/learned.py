"""The basis of a model: learned at its first start, read from the cache at the others."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsed.core import EngineSpec
from sparsed.engine.evaluate.texts import (
    load_tokenizer,
    opening_tokens,
    read_code,
    read_documentation,
)
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.models.dummy import DUMMY_PREFIX
from sparsed.engine.sparse.basis import Basis, Progress, learn_basis

# On SmolLM2 pages ranked by a basis of 512 tokens hold as much attention as by one of 2,048.
TEXT_TOKENS: Final = {"cpu": 512, "cuda": 4096}
RANDOM_TOKENS: Final = 256  # of a model without a tokenizer
CHARS_PER_TOKEN: Final = 16  # of a text, at most: what is tokenised is cut after

PIECE_BYTES: Final = 1 << 16  # of a file of weights, to know it again

_FORMAT: Final = 1
_WEIGHTS: Final = "*.safetensors"

logger = logging.getLogger(__name__)


def find_basis(
    spec: EngineSpec, decoder: Decoder, *, geometry: Geometry, on_progress: Progress
) -> Basis:
    """The basis of the model that ``spec`` names, float32 on its device. One is learned if the
    cache directory has none or a broken one, and kept there; what cannot be kept is learned again
    at the next start."""
    device = torch.device(spec.device)
    if spec.cache_dir is None:
        return _learn(spec, decoder, geometry=geometry, on_progress=on_progress)
    path = Path(spec.cache_dir) / "bases" / f"{_fingerprint(spec)}.safetensors"
    kept = _load(path, device=device, geometry=geometry)
    if kept is not None:
        return kept
    basis = _learn(spec, decoder, geometry=geometry, on_progress=on_progress)
    _save(basis, path)
    return basis


def _learn(
    spec: EngineSpec, decoder: Decoder, *, geometry: Geometry, on_progress: Progress
) -> Basis:
    return learn_model_basis(
        spec.model,
        decoder,
        max_tokens=spec.knobs.max_model_len,
        num_dims=geometry.kept_dims,
        on_progress=on_progress,
    )


def learn_model_basis(
    model: str, decoder: Decoder, *, max_tokens: int, num_dims: int, on_progress: Progress
) -> Basis:
    """The basis that an engine with that ``max_model_len`` learns of ``model``; not kept."""
    on_progress(0.0)
    return learn_basis(
        decoder,
        _tokens(model, decoder),
        max_tokens=max_tokens,
        num_dims=num_dims,
        on_progress=on_progress,
    )


def _tokens(model: str, decoder: Decoder) -> list[int]:
    """Half documentation, half code, of the ends of texts that every Python carries; random ones
    of a model without a tokenizer."""
    config, directory = decoder.config, Path(model)
    if model.startswith(DUMMY_PREFIX) or not (directory / "tokenizer.json").is_file():
        count = min(RANDOM_TOKENS, config.max_position)
        return random.Random(0).choices(range(config.vocab_size), k=count)
    count = min(TEXT_TOKENS[decoder.weights.embedding_VD.device.type], config.max_position)
    tokenizer = load_tokenizer(directory)
    tokens = opening_tokens(tokenizer)
    part = (count - len(tokens)) // 2
    for read in (read_documentation, read_code):
        text = read(Path())[-part * CHARS_PER_TOKEN :]
        tokens += tokenizer.encode(text, add_special_tokens=False).ids[-part:]
    return [token for token in tokens if token < config.vocab_size]


def _fingerprint(spec: EngineSpec) -> str:
    """Of the model, as far as its configuration and the names, sizes and a piece of its files tell
    it from others, and of what its basis is learned from and for."""
    if spec.model.startswith(DUMMY_PREFIX):
        facts = [spec.model, str(spec.seed)]
    else:
        directory = Path(spec.model)
        files = (*sorted(directory.glob(_WEIGHTS)), directory / "tokenizer.json")
        facts = [(directory / "config.json").read_text(encoding="utf-8")]
        facts += [_facts_of(file) for file in files if file.is_file()]
    num_tokens = TEXT_TOKENS[torch.device(spec.device).type]
    facts.append(f"{_FORMAT} {num_tokens} {spec.knobs.max_model_len}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _facts_of(file: Path) -> str:
    """Name, size and a piece from the middle, where weights differ between models alike."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(size // 2)
        piece = stream.read(PIECE_BYTES)
    return f"{file.name} {size} {hashlib.sha256(piece).hexdigest()}"


def _load(path: Path, *, device: torch.device, geometry: Geometry) -> Basis | None:
    """None if there is none of this shape, or it cannot be read."""
    try:
        tensors = load_file(path, device=str(device))
        basis = Basis(**tensors)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, TypeError) as error:
        logger.warning("the basis %s cannot be read (%s): it is learned again", path, error)
        return None
    lanes = geometry.num_layers, geometry.num_kv_heads
    maps = (*lanes, geometry.head_dim, geometry.kept_dims)
    shapes = [tuple(tensor.shape) for tensor in basis]
    if shapes != [maps, maps, (*lanes, geometry.head_dim)]:
        return None
    if not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in basis):
        return None
    return basis


def _save(basis: Basis, path: Path) -> None:
    """All of it or nothing."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: part.cpu().contiguous() for name, part in basis._asdict().items()}, beside)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            beside.unlink()
        logger.warning(
            "the basis %s cannot be kept (%s): the next start learns it again", path, error
        )
