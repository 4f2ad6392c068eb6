"""The numpy walk against transformers' vectors, float64 numpy, MLX's quantization and the engine; masks; resuming.

The norm of every tolerance is max |a - b| / max |b|.
"""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashsparse
from converter import model, walk, weights
from converter.convert import convert
from converter.forward import rope_frequencies
from converter.model import LayerWeights, Model, open_model
from converter.states import States
from converter.walk import Block, losses, perplexity, windows_of
from flashsparse.errors import CheckpointError, UsageError
from flashsparse.pack.layout import Quant
from flashsparse.pack.manifest import Manifest
from tests import numpy_llama
from tests.checkpoints import write_checkpoint
from tests.model.test_parity import dequantized_logits
from tests.vector_files import NAMES, error, read

TOLERANCE = 1e-5
DEMO = Path(flashsparse.__file__).parent / "demo_model"
IDS = np.random.default_rng(0).integers(0, 128, 50)


def logits_of(path: Path, tokens: np.ndarray, activation: str | None = None) -> np.ndarray:
    with open_model(path, activation) as opened:
        return opened.logits(walk.walk(opened, [tokens]).read(0))


def opened(path: Path, **options: Any) -> Model:
    return open_model(write_checkpoint(path / "source", **{"layers": 3, "intermediate": 48, **options}))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers(name: str) -> None:
    vector = read(name)
    found = logits_of(vector.folder, vector.tokens, vector.record["convert_activation"])
    assert error(found, vector.logits) < TOLERANCE


@pytest.mark.parametrize("name", ["bamboo-drelu", "llama-bias-silu", "opt-pre-relu", "opt-post-proj-relu"])
def test_a_pack_is_the_checkpoint(name: str, tmp_path: Path) -> None:
    vector = read(name)
    expected = logits_of(vector.folder, vector.tokens, vector.record["convert_activation"])
    for tier in ("auto", "dense"):
        pack = convert(vector.folder, tmp_path / tier, tier=tier, activation=vector.record["convert_activation"])
        np.testing.assert_array_equal(logits_of(pack, vector.tokens), expected)


@pytest.mark.parametrize(("bits", "tier"), [(8, "auto"), (4, "auto"), (4, "dense")])
@pytest.mark.parametrize("name", ["llama-wide-relu", "qwen2-drelu", "opt-pre-relu"])
def test_a_quantized_pack_is_what_mlx_makes_of_it(name: str, bits: int, tier: str, tmp_path: Path) -> None:
    vector = read(name)
    options = {"activation": vector.record["convert_activation"], "bits": bits, "tier": tier}
    pack = convert(vector.folder, tmp_path / "pack", group_size=32, **options)
    expected = dequantized_logits(vector, Manifest.load(pack))
    assert error(logits_of(pack, vector.tokens), expected) < TOLERANCE


def test_minicpm_scales(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "minicpm", layers=3, heads=8, kv_heads=2, tie=True)
    config, tensors = numpy_llama.load(source)
    assert error(logits_of(source, IDS), numpy_llama.logits(config, tensors, IDS, "relu")) < TOLERANCE


def test_the_engine_says_the_same_of_the_demo_model(tmp_path: Path) -> None:
    pack = convert(DEMO, tmp_path / "pack")
    with flashsparse.load(pack) as engine, engine.session() as session:
        tokens = engine.tokenizer.encode("Once upon a time, there was a little girl named Lily. " * 6)
        expected = session.logits(tokens)
    # The engine's KV cache is in 16 bits, the walk has none.
    assert error(logits_of(DEMO, np.array(tokens)), expected) < 2e-3


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_sixteen_bits(dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dtype=dtype, shards=2)
    config, tensors = numpy_llama.load(source)
    assert error(logits_of(source, IDS), numpy_llama.logits(config, tensors, IDS, "relu")) < TOLERANCE


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([None, "linear", "llama3", "yarn"]),
    st.sampled_from([8, 64, 128]),
    st.floats(1.5, 40),
    st.floats(0.2, 2),
    st.sampled_from([64, 4096]),
)
def test_rope_is_mlx_lms(kind: str | None, dim: int, factor: float, mscale: float, original: int) -> None:
    import mlx.core as mx
    from mlx_lm.models.rope_utils import initialize_rope

    from converter.forward import rotate

    more = {"original_max_position_embeddings": original, "factor": factor, "rope_type": kind}
    more |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    if kind == "yarn":
        more |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": 0.3}
    scaling = None if kind is None else more
    x = np.random.default_rng(dim).standard_normal((30, 2, dim)).astype(np.float32)
    config = {"head_dim": dim, "rope_theta": 10000.0, "rope_scaling": scaling}
    found = rotate(x, *rope_frequencies(config))
    rope = initialize_rope(dim, 10000.0, False, scaling, 8192)
    expected = np.array(rope(mx.array(x.transpose(1, 0, 2))[None])[0]).transpose(1, 0, 2)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["mistral-window-silu", "qwen2-mixed-relu", "opt-post-proj-relu"])
def test_the_size_of_blocks_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = read(name)
    monkeypatch.setattr("converter.walk.BLOCK_TOKENS", 17)
    monkeypatch.setattr("converter.forward.QUERY_BLOCK", 5)
    monkeypatch.setattr("converter.weights.BLOCK_BYTES", 1000)
    monkeypatch.setattr("converter.model.KEPT_BYTES", 0)
    monkeypatch.setattr("converter.model.HEAD_BYTES", 3000)
    assert error(logits_of(vector.folder, vector.tokens), vector.logits) < TOLERANCE


def test_windows_are_independent(tmp_path: Path) -> None:
    with opened(tmp_path) as m:
        windows = windows_of(IDS, 20)
        together = walk.walk(m, windows)
        for number, window in enumerate(windows):
            np.testing.assert_array_equal(walk.walk(m, [window]).read(0), together.read(number))


def test_windows_of() -> None:
    assert [w.tolist() for w in windows_of([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4]]
    assert [w.tolist() for w in windows_of([1, 2, 3, 4, 5], 3)] == [[1, 2, 3], [4, 5]]
    assert windows_of([1], 4) == windows_of([], 4) == []
    with pytest.raises(ValueError, match="at least 2"):
        windows_of([1, 2], 1)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_a_visitor_sees(family: str, tmp_path: Path) -> None:
    blocks: list[Block] = []
    layers: list[LayerWeights] = []
    with opened(tmp_path, family=family) as m:
        walk.walk(m, windows_of(IDS, 30), blocks.append, on_layer=lambda _, w: layers.append(w))
    assert [(b.layer, b.window, b.start, len(b.x)) for b in blocks[:3]] == [(0, 0, 0, 30), (0, 1, 0, 20), (1, 0, 0, 30)]
    for block in blocks:
        w = layers[block.layer]
        gate = block.x @ w.scoring.T + (0 if w.scoring_bias is None else w.scoring_bias)
        np.testing.assert_allclose(block.gate, gate, rtol=1e-5, atol=1e-5)
        assert (block.up is None) == (family == "opt")
        up = 1 if block.up is None else block.x @ w.up.T
        np.testing.assert_allclose(block.hidden, np.maximum(gate, 0) * up, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(w.down_norms, np.linalg.norm(w.down.astype(np.float64), axis=0), rtol=1e-5)
        assert block.head_norms.shape == (len(block.x), 4) and (block.head_norms > 0).all()


def test_masks(tmp_path: Path) -> None:
    with opened(tmp_path) as m:
        dense = walk.walk(m, [IDS]).read(0)
        np.testing.assert_array_equal(walk.walk(m, [IDS], lambda b: np.ones(b.hidden.shape, bool)).read(0), dense)
        np.testing.assert_allclose(walk.walk(m, [IDS], lambda b: b.hidden != 0).read(0), dense, rtol=1e-6, atol=1e-6)
        assert error(walk.walk(m, [IDS], lambda b: b.gate > 0.5).read(0), dense) > 1e-2
        with pytest.raises(ValueError, match="expected bool"):
            walk.walk(m, [IDS], lambda b: b.hidden)


def test_a_false_negative_takes_away_its_column(tmp_path: Path) -> None:
    weights_of: list[LayerWeights] = []
    outputs: list[tuple[Block, np.ndarray]] = []

    def without_7(block: Block) -> np.ndarray:
        mask = np.ones(block.hidden.shape, bool)
        mask[3, 7] = False
        return mask

    with opened(tmp_path, layers=1) as m:
        for visit in (None, without_7):
            walk.walk(
                m,
                [IDS],
                visit,
                on_layer=lambda _, w: weights_of.append(w),
                on_output=lambda block, ffn, _: outputs.append((block, ffn)),
            )
    (block, dense), (_, masked) = outputs
    change = np.zeros_like(dense)
    change[3] = block.hidden[3, 7] * weights_of[0].down[:, 7]
    np.testing.assert_allclose(dense - masked, change, atol=1e-5)


@pytest.mark.parametrize("kept", [model.KEPT_BYTES, 0])
def test_losses(kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.model.KEPT_BYTES", kept)
    monkeypatch.setattr("converter.model.HEAD_BYTES", 5000)
    monkeypatch.setattr("converter.walk.LOGITS_TOKENS", 25)
    windows = windows_of(IDS, 15)
    with opened(tmp_path) as m:
        states = walk.walk(m, windows)
        found = losses(m, states, windows)
        rows = [m.logits(state).astype(np.float64) for state in states]
    expected = [
        np.log(np.exp(row[:-1]).sum(axis=1)) - row[np.arange(len(row) - 1), window[1:]]
        for row, window in zip(rows, windows, strict=True)
    ]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5)
    assert len(found) == 50 - len(windows)
    assert perplexity(np.log([2.0, 8.0])) == pytest.approx(4)


class Killed(Exception):
    pass


def killer(at: int) -> Callable[[str, int, int], None]:
    calls = iter(range(at, -1, -1))

    def progress(what: str, done: int, total: int) -> None:
        if next(calls) == 0:
            raise Killed

    return progress


@pytest.mark.parametrize("at", [0, 1, 2, 4, 5, 8])
def test_a_killed_walk_goes_on(at: int, tmp_path: Path) -> None:
    windows = windows_of(IDS, 20)
    with opened(tmp_path) as m:
        expected = list(walk.walk(m, windows))
        done: list[int] = []
        with pytest.raises(Killed):
            walk.walk(m, windows, work=tmp_path / "work", on_done=done.append, progress=killer(at))
        assert done == list(range(at // 3))
        blocks: list[Block] = []
        states = walk.walk(m, windows, blocks.append, work=tmp_path / "work", resume=True, on_done=done.append)
        # What was on_done'd before the last kill may come again, never be left out.
        assert sorted({*done}) == [0, 1, 2] and blocks[0].layer == at // 3
        for found, wanted in zip(states, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert len(list((tmp_path / "work").glob("states-*"))) == 1
        states.remove()
        assert not list((tmp_path / "work").iterdir())


def test_a_layer_counts_as_done_only_after_on_done(tmp_path: Path) -> None:
    def fails(layer: int) -> None:
        if layer == 1:
            raise Killed

    done: list[int] = []
    with opened(tmp_path) as m:
        with pytest.raises(Killed):
            walk.walk(m, [IDS], work=tmp_path / "work", on_done=fails)
        walk.walk(m, [IDS], work=tmp_path / "work", resume=True, on_done=done.append)
    assert done == [1, 2]


def test_another_walk_is_not_resumed(tmp_path: Path) -> None:
    work = tmp_path / "work"

    def layers(ids: np.ndarray, resume: bool = True, key: str = "") -> int:
        done: list[int] = []
        walk.walk(m, [ids], work=work, resume=resume, key=key, on_done=done.append).close()
        return len(done)

    with opened(tmp_path) as m:
        assert [layers(IDS), layers(IDS), layers(IDS[1:]), layers(IDS)] == [3, 0, 3, 3]
        assert [layers(IDS), layers(IDS, key="other"), layers(IDS), layers(IDS, resume=False)] == [0, 3, 3, 3]
        (work / "states-3.f32").write_bytes(b"short")
        assert layers(IDS) == 3
        (work / "walk.json").write_text("{")
        assert layers(IDS) == 3


def test_states_in_memory_and_on_disk(tmp_path: Path) -> None:
    values = [np.random.default_rng(n).standard_normal((n + 1, 4)).astype(np.float32) for n in range(3)]
    for states in (States([1, 2, 3], 4), States([1, 2, 3], 4, tmp_path)):
        for factor in (1, 2):
            for value in values:
                states.write(value * factor)
        assert states.layer == 1 and states.tokens == 6
        for found, value in zip(states, values, strict=True):
            np.testing.assert_array_equal(found, 2 * value)
        states.remove()


def test_a_layer_is_not_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("converter.weights", "flashsparse.pack.codec"):
        monkeypatch.setattr(f"{module}.BLOCK_BYTES", 1 << 18)
    source = write_checkpoint(tmp_path / "source", hidden=256, intermediate=4096, layers=2, dtype="BF16")
    for path in (source, convert(source, tmp_path / "pack"), convert(source, tmp_path / "four", bits=4)):
        with open_model(path) as m:
            m.layer(0)
            tracemalloc.start()
            layer = m.layer(1)
            held, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        size = sum(values.nbytes for values in vars(layer).values() if isinstance(values, np.ndarray))
        assert size > 12e6 and held < 1.1 * size and peak < 1.2 * size, path
        del layer
        with open_model(path) as m:
            tracemalloc.start()
            walk.walk(m, [IDS])
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 1.5 * size, path  # activations included


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantized_words_are_mlxs(bits: int) -> None:
    import mlx.core as mx

    rows = np.random.default_rng(bits).standard_normal((6, 64)).astype(np.float32)
    parts = mx.quantize(mx.array(rows), group_size=32, bits=bits)
    expected = np.array(mx.dequantize(*parts, group_size=32, bits=bits))
    found = weights.dequantize(*(np.array(part) for part in parts), Quant(bits, 32))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_one_bit() -> None:
    words = np.array([[0b1011, 1 << 31]], np.uint32)
    assert np.flatnonzero(weights.unpack(words, 1)[0]).tolist() == [0, 1, 3, 63]


def test_tokens_and_windows_are_checked(tmp_path: Path) -> None:
    with opened(tmp_path) as m:
        assert m.embed([3, 3]).shape == (2, 64)
        for ids, kind, message in (
            ([1, 128], CheckpointError, "token 128.*below 128"),
            ([-1], CheckpointError, "token -1"),
            (np.zeros(513, int), UsageError, "513 tokens.*512"),
            ([], UsageError, "0 tokens"),
        ):
            with pytest.raises(kind, match=message):
                m.embed(ids)


def test_opening(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "one", dtype="F16")
    pack = convert(source, tmp_path / "pack")
    with pytest.raises(UsageError, match="is a pack, whose activation is fixed"):
        open_model(pack, "silu")
    with pytest.raises(UsageError, match="no such directory"):
        open_model(tmp_path / "nothing")
    with open_model(source, "fatrelu:0.5") as m:
        assert (m.activation.name, m.activation.param, m.family, m.gated) == ("fatrelu", 0.5, "llama", True)
        assert (m.layers, m.heads, m.kv_heads, m.head_dim, m.context) == (2, 4, 2, 16, 512)
        with pytest.raises(CheckpointError, match="no tokenizer, expected tokenizer"):
            m.tokenizer()


def test_the_digest_names_the_weights(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        with open_model(path) as m:
            return m.digest

    one, other = (write_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    assert digest(one) == digest(copy) != digest(other)
    config = json.loads((copy / "config.json").read_text()) | {"rms_norm_eps": 1e-4}
    (copy / "config.json").write_text(json.dumps(config))
    assert digest(one) != digest(copy)
    pack = convert(one, tmp_path / "pack")
    assert digest(pack) == Manifest.load(pack).digest
