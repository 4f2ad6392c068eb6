"""A synthetic checkpoint shows its profile in a real forward pass, attention and FFN included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.activity import PAPER, PERSISTENT, PROFILES, check_profile, measure
from bench.synthetic import Codec, Planter, Shape, load_fixture, main, walk, write
from flashsparse.pack.safetensors import read_header, read_tensor

SHAPE = Shape(hidden=256, intermediate=2048, layers=3, heads=4, kv_heads=2, vocab=400, positions=256, tokens=144)


class NumpyLlama:
    """A plain float32 Llama forward pass that notes every layer's active sets and FFN inputs."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        self.codec = Codec(self.config["torch_dtype"])
        headers = {name: read_header(directory / name) for name in set(index.values())}
        self.weights = {
            name: self.codec.decode(read_tensor(headers[file], name).view(self.codec.bits))
            for name, file in index.items()
        }

    def layer(self, n: int, name: str) -> np.ndarray:
        return self.weights[f"model.layers.{n}.{name}.weight"]

    def run(self, tokens: list[int]) -> tuple[list[list[np.ndarray]], list[np.ndarray], np.ndarray]:
        h = self.weights["model.embed_tokens.weight"][tokens]
        sets, inputs = [], []
        for n in range(self.config["num_hidden_layers"]):
            h = h + self.attention(n, self.norm(h))
            x = self.norm(h)
            gate = np.maximum(x @ self.layer(n, "mlp.gate_proj").T, 0)
            h = h + (gate * (x @ self.layer(n, "mlp.up_proj").T)) @ self.layer(n, "mlp.down_proj").T
            sets.append([np.flatnonzero(row) for row in gate])
            inputs.append(x)
        return sets, inputs, h

    def norm(self, h: np.ndarray) -> np.ndarray:
        return h / np.sqrt(np.mean(h**2, axis=1, keepdims=True) + self.config["rms_norm_eps"])

    def attention(self, n: int, x: np.ndarray) -> np.ndarray:
        heads, kv_heads, size = (self.config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        q = rotate((x @ self.layer(n, "self_attn.q_proj").T).reshape(len(x), heads, size))
        k = rotate((x @ self.layer(n, "self_attn.k_proj").T).reshape(len(x), kv_heads, size))
        v = (x @ self.layer(n, "self_attn.v_proj").T).reshape(len(x), kv_heads, size)
        k, v = np.repeat(k, heads // kv_heads, axis=1), np.repeat(v, heads // kv_heads, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(size)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(axis=-1, keepdims=True), v)
        return mixed.reshape(len(x), -1) @ self.layer(n, "self_attn.o_proj").T


def rotate(x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None].astype(np.float32), np.sin(angle)[:, None].astype(np.float32)
    return np.concatenate([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


@pytest.mark.parametrize(("profile", "dtype"), [(PAPER, "float16"), (PERSISTENT, "bfloat16")])
def test_forward_pass_shows_the_profile(tmp_path: Path, profile, dtype: str) -> None:
    write(tmp_path / "m", SHAPE, profile, dtype, shard_bytes=1_000_000)
    fixture = load_fixture(tmp_path / "m")
    model = NumpyLlama(tmp_path / "m")
    sets, inputs, _ = model.run(fixture.tokens)
    assert fixture.profile is profile and len(set(fixture.tokens)) == SHAPE.tokens
    assert check_profile(measure(sets, SHAPE.intermediate, fixture.hot), profile) == []
    for n in range(SHAPE.layers):  # no layer hides behind the others
        density = np.mean([len(ids) for ids in sets[n]]) / SHAPE.intermediate
        assert density == pytest.approx(profile.asked["density"], rel=0.1)
        recall = low_rank_recall(model.layer(n, "mlp.gate_proj"), fixture.rank, inputs[n])
        assert recall == pytest.approx(profile.recall, abs=0.04)


def low_rank_recall(gate: np.ndarray, rank: int, x: np.ndarray) -> float:
    """Share of the active neurons that the gate's truncated SVD names when it names as many as are active."""
    v = np.linalg.eigh(gate.T @ gate)[1][:, -rank:]  # the leading right singular vectors
    active = x @ gate.T > 0
    score = (x @ v) @ (gate @ v).T
    threshold = np.partition(score.ravel(), -active.sum())[-active.sum()]
    return float((active & (score >= threshold)).sum() / active.sum())


def test_branches_stay_small_but_count(tmp_path: Path) -> None:
    write(tmp_path / "m", SHAPE, PAPER)
    model = NumpyLlama(tmp_path / "m")
    tokens = load_fixture(tmp_path / "m").tokens[:32]
    _, _, h = model.run(tokens)
    e = model.weights["model.embed_tokens.weight"][tokens]
    moved = np.linalg.norm(h - e, axis=1) / np.linalg.norm(e, axis=1)
    assert moved.min() > 0.005 and moved.max() < 0.2
    assert np.linalg.norm(e, axis=1) == pytest.approx(np.sqrt(SHAPE.hidden), rel=1e-3)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    shape = Shape(64, 320, 2, 2, 2, 200, positions=128, tokens=120)
    profile = PAPER
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        try:
            write(tmp_path / name, shape, profile, seed=seed)
        except ValueError as error:  # a shape this small may miss the profile; the bytes are written all the same
            assert "miss profile paper" in str(error)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokens.json"]
    same = {name: (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files}
    assert all(same.values())
    assert (tmp_path / "a" / files[1]).read_bytes() != (tmp_path / "c" / files[1]).read_bytes()


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    write(tmp_path / "m", SHAPE, PAPER, shard_bytes=1_500_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    stored = [name for file in sorted(set(index.values())) for name in read_header(tmp_path / "m" / file).tensors]
    assert sorted(stored) == sorted(index)
    assert len(stored) == 3 + 9 * SHAPE.layers


def test_command_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, [str(tmp_path / "m"), "--profile", "persistent", "--layers", "1", "--dtype", "bfloat16"]
    )
    assert done.exit_code == 0, done.output
    assert "persistence_1" in done.output and "asked 0.8200" in done.output
    again = CliRunner().invoke(main, [str(tmp_path / "m")])
    assert again.exit_code == 1 and "is not empty" in again.output


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.95])
def test_walk_keeps_its_cosines(memory: float) -> None:
    steps = walk(60, 24, memory, np.random.default_rng(0))
    cosines = steps @ steps.T
    for lag in range(9):
        assert np.diagonal(cosines, lag) == pytest.approx(memory**lag, abs=1e-5)


def test_profiles_follow_from_their_parameters() -> None:
    """The figures asked are those of the Gaussian process that the profile describes."""
    from bench.synthetic import drive, thresholds

    for profile in PROFILES.values():
        rng = np.random.default_rng(0)
        theta = thresholds(20000, profile, rng)
        z = drive(80, 128, profile, rng)
        active = z @ rng.standard_normal((128, 20000), np.float32) > theta
        hot = np.argsort(theta)[:2000]
        measured = measure([[np.flatnonzero(row) for row in active]], 20000, [hot])
        assert {key: measured[key] for key in profile.asked} == pytest.approx(profile.asked, rel=0.04)


def test_measure_by_hand() -> None:
    # Neuron 0 always, neuron 1 every second token, neuron 2 every fifth, neuron 3 never; ten tokens.
    layer = [np.array([0] + [1] * (t % 2 == 0) + [2] * (t % 5 == 0)) for t in range(10)]
    figures = measure([layer], 10)
    assert figures["density"] == pytest.approx((10 + 5 + 2) / 100)
    assert figures["hot_share"] == pytest.approx(10 / 17)
    # Tokens 8 and 9 count: {0, 1} after {0}, {0}, ...; {0} after {0, 1}.
    assert figures["persistence_1"] == pytest.approx(2 / 3)
    assert figures["persistence_2"] == 1
    assert figures["new"] == 0
    assert figures["union_4"] == pytest.approx((3 + 2) / 20)
    with pytest.raises(ValueError, match="at least 9"):
        measure([layer[:8]], 10)


def test_check_profile_voids_what_is_off() -> None:
    assert check_profile(dict(PAPER.asked), "paper") == []
    off = dict(PAPER.asked) | {"density": 0.112, "new": float("nan")}
    assert [line.split()[0] for line in check_profile(off, PAPER)] == ["density", "new"]


def test_a_hidden_size_beyond_the_pool() -> None:
    shape = Shape(4224, 1024, 1, 33, 33, 64, positions=64, tokens=16)
    planter = Planter(shape, PROFILES["paper"], "float16", 0)
    rows = planter.cut(planter._pool, 1024, shape.hidden, planter.rng("gate"))
    assert rows.shape == (1024, 4224)  # as many as a gate is made of at a time
