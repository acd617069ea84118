"""The basis of keys: what it is learned from, where it is kept, that it holds at all positions.

Shape legend: N positions, H KV heads, G query heads per KV head, D head dim, J moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsed.core import EngineSpec
from sparsed.engine.assembly import load_decoder
from sparsed.engine.evaluate.texts import load_tokenizer, read_code, read_documentation
from sparsed.engine.kvcache.geometry import Geometry
from sparsed.engine.models.decoder import Decoder
from sparsed.engine.models.rope import Rope
from sparsed.engine.models.rope_config import RopeConfig
from sparsed.engine.runner import Runner
from sparsed.engine.sparse import learned
from sparsed.engine.sparse.basis import Basis, Moments, learn_basis, product_basis
from sparsed.engine.sparse.learned import find_basis
from sparsed.kernels.rotate import rotate_heads

MakeSpec = Callable[..., EngineSpec]


class Finder:
    """Finds the basis of one model again and again; ``reports`` tells whether it was learned."""

    def __init__(self, spec: EngineSpec, cache_dir: Path) -> None:
        self.spec = replace(spec, cache_dir=str(cache_dir))
        self.decoder = load(spec)
        shape = self.decoder.config.shape
        self.geometry = Geometry.of(shape, dtype="float32", page_size=8)
        self.reports: list[float] = []

    def find(self, **changes: object) -> Basis:
        spec = replace(self.spec, **changes)  # type: ignore[arg-type]  # fields by name
        self.reports.clear()
        return find_basis(
            spec, self.decoder, geometry=self.geometry, on_progress=self.reports.append
        )

    @property
    def file(self) -> Path:
        (file,) = Path(str(self.spec.cache_dir)).glob("bases/*.safetensors")
        return file


def load(spec: EngineSpec) -> Decoder:
    device = torch.device("cpu")
    return load_decoder(spec.model, device=device, dtype=torch.float32, on_progress=lambda *_: None)


@pytest.fixture
def finder(make_spec: MakeSpec, tmp_path: Path) -> Finder:
    return Finder(make_spec("dummy:tiny"), tmp_path)


def equal(one: Basis, other: Basis) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- where it is kept ----------------------------------------------------------------------------


def test_a_basis_is_learned_once(finder: Finder) -> None:
    made = finder.find()
    assert finder.reports[0] == 0.0 and finder.reports[-1] == 1.0
    shape, dims = finder.decoder.config.shape, finder.geometry.kept_dims
    assert made.keys_LHDR.shape == (shape.num_layers, shape.num_kv_heads, shape.head_dim, dims)
    assert all(part.dtype == torch.float32 for part in made)
    assert equal(finder.find(), made)
    assert finder.reports == [], "read, not learned"
    assert equal(finder.find(cache_dir=None), made), "always the same"
    assert finder.reports[-1] == 1.0


def test_another_model_has_another_basis(finder: Finder) -> None:
    finder.find()
    for changes in ({"seed": 7}, {"knobs": replace(finder.spec.knobs, max_model_len=1024)}):
        finder.find(**changes)
        assert finder.reports, changes
    assert len(list(Path(str(finder.spec.cache_dir)).glob("bases/*"))) == 3


def spoil_nothing_left(file: Path) -> None:
    file.write_bytes(b"")


def spoil_cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def spoil_fewer_dims(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {"keys_LHDR": tensors["keys_LHDR"][..., :4].contiguous()}, file)


def spoil_no_number(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {"centre_LHD": tensors["centre_LHD"] * float("nan")}, file)


def spoil_other_names(file: Path) -> None:
    save_file({"centre_LHD": torch.zeros(1)}, file)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_nothing_left,
        spoil_cut_short,
        spoil_fewer_dims,
        spoil_no_number,
        spoil_other_names,
    ],
)
def test_a_broken_file_is_learned_anew(finder: Finder, spoil: Callable[[Path], None]) -> None:
    made = finder.find()
    spoil(finder.file)
    assert equal(finder.find(), made)
    assert finder.reports
    finder.find()
    assert not finder.reports, "and kept"


def test_what_cannot_be_kept_is_used(finder: Finder, caplog: pytest.LogCaptureFixture) -> None:
    blocked = Path(str(finder.spec.cache_dir)) / "a file"
    blocked.write_text("")
    made = finder.find(cache_dir=str(blocked))
    assert "cannot be kept" in caplog.text
    assert equal(finder.find(), made)


def test_an_engine_says_that_it_learns(make_spec: MakeSpec, tmp_path: Path) -> None:
    heard: list[str] = []
    starts = (("mean-key", True), ("mean-key", False), ("quest", False))
    for sparse_method, learns in starts:
        spec = replace(make_spec(sparse_method=sparse_method), cache_dir=str(tmp_path))
        heard.clear()
        Runner(spec, on_progress=lambda phase, _: heard.append(phase))
        assert ("learning the basis of keys" in heard) == learns


# -- what it is learned from ---------------------------------------------------------------------


@pytest.mark.slow
def test_real_weights_learn_from_text(
    smollm2: Path, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(make_spec(smollm2, max_model_len=2048), cache_dir=str(tmp_path))
    heard: list[list[int]] = []

    def hear(decoder: Decoder, tokens: list[int], **_: object) -> Basis:
        heard.append(tokens)
        return Basis(*(torch.zeros(1) for _ in range(3)))

    monkeypatch.setattr(learned, "learn_basis", hear)
    finder = Finder(spec, tmp_path)
    finder.find()
    finder.find()
    first, second = heard
    assert first == second
    assert len(first) == 512
    assert len(set(first)) > 100
    text = load_tokenizer(smollm2).decode(first)
    assert text.endswith(read_code(Path())[-100:])
    assert read_documentation(Path())[-100:] in text


# -- what it holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_moves_take_heads_on(kind: str) -> None:
    config = RopeConfig(kind=kind, theta=1000.0, factor=4.0, original_max_position=64)
    rope = Rope(config, head_dim=16, device=torch.device("cpu"))

    def rotated(positions_N: Tensor) -> Tensor:
        cos_ND, sin_ND = rope.tables(positions_N, lengths_N=None, dtype=torch.float32)
        return rotate_heads(heads_NHD, cos_ND, sin_ND, norm_HD=None, eps=0.0)

    heads_NHD = torch.randn((9, 2, 16), generator=torch.Generator().manual_seed(0))
    positions_N = torch.arange(9)
    moves_JDD = rope.moves(torch.tensor([0, 5, 70]))
    for move_DD, offset in zip(moves_JDD.float(), (0, 5, 70), strict=True):
        moved_NHD = rotated(positions_N) @ move_DD.T
        torch.testing.assert_close(moved_NHD, rotated(positions_N + offset), atol=1e-5, rtol=1e-5)


def test_moments_of_moved_heads_are_moved_moments() -> None:
    random = torch.Generator().manual_seed(1)
    q_NHGD = torch.randn((20, 2, 3, 8), generator=random).double()
    keys_HND = torch.randn((2, 20, 8), generator=random).double() + 1
    moves_JDD = torch.linalg.qr(torch.randn((4, 8, 8), generator=random).double()).Q
    parts = [Moments.of(q_NHGD @ move.T, keys_HND @ move.T) for move in moves_JDD]
    expected = [torch.stack(part).mean(0) for part in zip(*parts, strict=True)]
    for found, wanted in zip(Moments.of(q_NHGD, keys_HND).spread(moves_JDD), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_basis_of_one_position_fails_far_away_and_a_spread_one_does_not() -> None:
    """Keys that differ in one slow pair of dims: near the start in one direction, far off in
    another. One dim holds each of them, two hold both."""
    rope = Rope(RopeConfig(theta=1e4), head_dim=8, device=torch.device("cpu"))
    random = torch.Generator().manual_seed(2)
    q_NHGD = torch.randn((400, 1, 1, 8), generator=random).double()
    strengths_D = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.1, 0.1, 0.1, 0.1]).double()
    keys_HND = torch.randn((1, 400, 8), generator=random).double() * strengths_D
    far_DD = rope.moves(torch.tensor([1500]))[0]  # a quarter of a turn of the slowest pair
    moves_JDD = rope.moves(torch.arange(0, 3000, 50))

    def error(moments: Moments) -> float:
        keys, queries, _ = (part[0].double() for part in product_basis(moments))
        far_keys_ND, far_q_ND = keys_HND[0] @ far_DD.T, q_NHGD[:, 0, 0] @ far_DD.T
        exact = far_q_ND @ far_keys_ND.T
        found = (far_q_ND @ queries[:, :2]) @ (far_keys_ND @ keys[:, :2]).T
        return float((found - exact).norm() / exact.norm())

    near = Moments.of(q_NHGD, keys_HND)
    assert error(near.spread(moves_JDD)) < 0.15
    assert error(near) > 0.5


@pytest.mark.parametrize("max_tokens", [100, 5000])
def test_a_learned_basis_gives_the_products_of_its_text(
    make_spec: MakeSpec, max_tokens: int
) -> None:
    """With all dims: products less those with the centre, in every lane."""
    decoder = load(make_spec("dummy:tiny"))
    shape, tokens = decoder.config.shape, list(range(3, 103))
    basis = learn_basis(
        decoder,
        tokens,
        max_tokens=max_tokens,
        num_dims=shape.head_dim,
        on_progress=lambda _: None,
    )
    assert len(basis.centre_LHD) == shape.num_layers
    x = torch.randn((7, shape.head_dim), generator=torch.Generator().manual_seed(0))
    for keys_HDR, queries_HDR in zip(basis.keys_LHDR, basis.queries_LHDR, strict=True):
        found = (x @ queries_HDR) @ (x @ keys_HDR).mT
        expected = (x @ x.T).expand_as(found)
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
