"""Whole models against transformers: logits, greedy tokens, every tier, budget and width of weights.

The vectors are committed, so no torch is needed; what transformers has no reference for is compared with numpy in
float64. The norm of every tolerance is max |a - b| / max |b| over a case's logits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from tests import checkpoints, numpy_llama
from tests.vector_files import NAMES, TOLERANCE, Vector, engine_greedy, engine_logits, error, read

SPARSE = [name for name in NAMES if read(name).sparse]
QUANTIZED = ["llama-wide-relu", "llama-bias-silu", "llama-bias-relu2", "qwen2-drelu", "opt-pre-relu"]
SIXTEEN_BIT = ["llama-gqa-tied-relu", "llama-bias-silu", "mistral-window-v4-relu", "opt-post-proj-relu"]

MakePack = Callable[..., Path]


@pytest.fixture(scope="session")
def make_pack(tmp_path_factory: pytest.TempPathFactory) -> MakePack:
    """Converts a case, once for each set of options."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, folder: Path | None = None, **options: Any) -> Path:
        from converter.convert import convert

        vector, key = read(name), (name, f"{folder} {sorted(options.items())}")
        if key not in made:
            target = tmp_path_factory.mktemp("packs") / name
            made[key] = convert(
                folder or vector.folder, target, activation=vector.record["convert_activation"], **options
            )
        return made[key]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens(name: str, make_pack: MakePack) -> None:
    vector = read(name)
    with flashsparse.load(make_pack(name)) as engine:
        assert engine.manifest.tier == ("exact" if vector.sparse else "dense")
        assert error(engine_logits(engine, vector), vector.logits) < TOLERANCE
        assert engine_greedy(engine, vector) == vector.greedy.tolist()


@pytest.mark.parametrize("name", SPARSE)
def test_dense_tier_of_sparse_models(name: str, make_pack: MakePack) -> None:
    vector = read(name)
    with flashsparse.load(make_pack(name, tier="dense")) as engine:
        assert engine.manifest.tier == "dense"
        assert error(engine_logits(engine, vector), vector.logits) < TOLERANCE
        assert engine_greedy(engine, vector) == vector.greedy.tolist()


@pytest.mark.parametrize("name", SPARSE)
def test_every_number_of_slots_gives_the_same_logits(name: str, make_pack: MakePack) -> None:
    vector, pack = read(name), make_pack(name)
    one = vector.largest_set()
    found = [engine_at(pack, vector, slots=slots) for slots in (one // 2, one, 10 * one)]
    assert error(found[0], vector.logits) < TOLERANCE
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_floor_works_and_less_is_refused(name: str, make_pack: MakePack) -> None:
    vector, pack = read(name), make_pack(name)
    with pytest.raises(flashsparse.BudgetError) as refused:
        flashsparse.load(pack, dram=1, max_kv_size=128)
    smallest = refused.value.smallest
    with pytest.raises(flashsparse.BudgetError):
        flashsparse.load(pack, dram=smallest - 1, max_kv_size=128)
    logits = engine_at(pack, vector, dram=smallest, max_kv_size=128)
    assert error(logits, vector.logits) < TOLERANCE
    np.testing.assert_array_equal(logits, engine_at(pack, vector))


@pytest.mark.parametrize("name", ["llama-bias-silu", "llama-wide-relu", "qwen2-drelu", "opt-pre-relu"])
@pytest.mark.parametrize(
    "options",
    [{"threads": 1}, {"threads": 3}, {"io_threads": 1}, {"read_mode": "buffered"}, {"slots": 7, "threads": 2}],
    ids=str,
)
def test_threads_and_read_modes_change_nothing(name: str, options: dict[str, Any], make_pack: MakePack) -> None:
    vector, pack = read(name), make_pack(name)
    np.testing.assert_array_equal(engine_at(pack, vector, **options), engine_at(pack, vector))


@pytest.mark.parametrize("name", ["llama-wide-relu", "llama-mha-silu", "opt-post-proj-relu"])
def test_a_conversation_fed_in_parts_is_the_same(name: str, make_pack: MakePack) -> None:
    vector = read(name)
    with flashsparse.load(make_pack(name)) as engine, engine.session() as session:
        parts = [session.logits(part) for part in np.split(vector.tokens, [1, 3, 40, 41, 100])]
    assert error(np.concatenate(parts), vector.logits) < TOLERANCE


@pytest.mark.parametrize("tier", ["auto", "dense"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_match_their_dequantized_values(name: str, bits: int, tier: str, make_pack: MakePack) -> None:
    vector = read(name)
    pack = make_pack(name, bits=bits, group_size=32, tier=tier)
    with flashsparse.load(pack) as engine:
        expected = dequantized_logits(vector, engine.manifest)
        assert error(engine_logits(engine, vector), expected) < TOLERANCE
        assert error(expected, vector.logits) > 1e-4


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_sixteen_bit_sources(name: str, dtype: str, tmp_path: Path, make_pack: MakePack) -> None:
    vector, folder = read(name), tmp_path / "checkpoint"
    config, weights = numpy_llama.load(vector.folder)
    rounded = {key: numpy_llama.round_to(value, dtype) for key, value in weights.items()}
    folder.mkdir()
    shutil.copy(vector.folder / "config.json", folder)
    stored = {key: (dtype, checkpoints.encode(value, dtype)) for key, value in rounded.items()}
    checkpoints.write_safetensors(folder / "model.safetensors", stored)
    activation, param = vector.record["activation"], vector.record["param"]
    expected = numpy_llama.logits(config, rounded, vector.tokens, activation, param, kv_dtype=dtype)
    with flashsparse.load(make_pack(name, folder=folder)) as engine:
        # The KV cache rounds to 16 bits: a key next to a boundary may round the other way than float64's.
        assert error(engine_logits(engine, vector), expected) < (1e-3 if dtype == "F16" else 8e-3)


def engine_at(pack: Path, vector: Vector, **options: Any) -> np.ndarray:
    with flashsparse.load(pack, **options) as engine:
        return engine_logits(engine, vector)


def dequantized_logits(vector: Vector, manifest: Any) -> np.ndarray:
    """Float64 logits of the checkpoint after MLX quantized and dequantized what the manifest says is quantized."""
    config, weights = numpy_llama.load(vector.folder)
    for name, values in weights.items():
        base = name.removesuffix(".weight")
        quant = manifest.resident_quant.get(base)
        if quant is not None:
            weights[name] = through_mlx(values, quant)
        elif base.endswith((".gate_proj", ".up_proj", ".fc1")) and name.endswith(".weight"):
            weights[name] = through_mlx(values, manifest.quant)
        elif base.endswith((".down_proj", ".fc2")) and name.endswith(".weight"):
            weights[name] = through_mlx(values.T, manifest.quant).T
    return numpy_llama.logits(config, weights, vector.tokens, vector.record["activation"], vector.record["param"])


def through_mlx(values: np.ndarray, quant: Any) -> np.ndarray:
    import mlx.core as mx

    parts = mx.quantize(mx.array(values.astype(np.float32)), group_size=quant.group_size, bits=quant.bits)
    back = mx.dequantize(*parts, group_size=quant.group_size, bits=quant.bits)
    return np.array(back, copy=True).astype(np.float64)
