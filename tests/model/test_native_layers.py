"""Whole layers in native code: what they compute, that chunks change no bit, and when their weights are read.

Parity of the native path with transformers is test_parity.py's, which runs it by default; here the path of mlx-lm's
modules is compared with the native one and with the same vectors.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse.pack.safetensors import read_header
from tests.checkpoints import write_checkpoint
from tests.model.packs import make_pack
from tests.vector_files import NAMES, TOLERANCE, engine_logits, error, read

CASES = ["llama-yarn-relu", "llama-llama3-v4-silu", "mistral-window-v4-relu", "opt-post-proj-relu", "opt-pre-relu"]
PROMPT = [int(t) for t in np.random.default_rng(1).integers(3, 160, 90)]
TOKENS = [token % 128 for token in PROMPT]


def converted(name: str, folder: Path) -> Path:
    from converter.convert import convert

    vector = read(name)
    return convert(vector.folder, folder / name, activation=vector.record["convert_activation"])


def logits(path: Path, parts: list[list[int]], **options: Any) -> np.ndarray:
    with flashsparse.load(path, **options) as engine, engine.session() as session:
        return np.concatenate([session.logits(part) for part in parts])


@pytest.mark.parametrize("name", NAMES)
def test_the_path_of_modules_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    vector, pack = read(name), converted(name, tmp_path)
    with flashsparse.load(pack, layers="modules") as engine:
        assert engine.layers == "modules"
        modules = engine_logits(engine, vector)
    with flashsparse.load(pack) as engine:
        assert engine.layers == "native"
        native = engine_logits(engine, vector)
    assert error(modules, vector.logits) < TOLERANCE
    assert error(native, modules) < TOLERANCE / 5


@pytest.mark.parametrize("name", CASES)
def test_chunks_threads_and_slots_change_no_bit(name: str, tmp_path: Path) -> None:
    vector, pack = read(name), converted(name, tmp_path)
    tokens = [int(t) for t in vector.tokens]
    expected = logits(pack, [[token] for token in tokens], threads=1)
    for size in (2, 7, 64, 128):
        parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        np.testing.assert_array_equal(logits(pack, parts, threads=3, slots=9), expected)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("bits", [16, 4])
def test_sixteen_bit_caches_and_quantized_weights_keep_their_bits(dtype: str, bits: int, tmp_path: Path) -> None:
    pack = make_pack(tmp_path, dtype=dtype, bits=bits)
    expected = logits(pack, [[token] for token in PROMPT])
    np.testing.assert_array_equal(logits(pack, [PROMPT[:1], PROMPT[1:40], PROMPT[40:]], threads=2), expected)


def test_the_scales_of_minicpm_are_applied(tmp_path: Path) -> None:
    from converter.convert import convert

    source = write_checkpoint(tmp_path / "source", "minicpm", layers=2, heads=8, kv_heads=2)
    pack = convert(source, tmp_path / "pack")
    native, modules = logits(pack, [TOKENS]), logits(pack, [TOKENS], layers="modules")
    assert error(native, modules) < TOLERANCE / 5


def test_time_is_told_apart(tmp_path: Path) -> None:
    with flashsparse.load(make_pack(tmp_path)) as engine, engine.session() as session:
        *_, last = session.generate(PROMPT, max_tokens=20)
        found = last.stats.decode
    assert min(found.attention_s, found.ffn_s, found.head_s, found.compute_s) > 0
    assert found.attention_s + found.ffn_s + found.head_s < found.seconds
    assert found.bookkeeping_s is not None and 0 < found.bookkeeping_s < found.seconds


class Listening:
    """A lookahead that keeps what it is told."""

    active = True

    def __init__(self) -> None:
        self.heard: list[np.ndarray] = []

    def start(self, h: np.ndarray) -> None:
        self.heard.append(h.copy())

    def claim(self, ids: np.ndarray) -> None:
        """Nothing was read."""

    def drop(self) -> None:
        """Nothing is under way."""


@pytest.mark.parametrize("name", ["llama-gqa-tied-relu", "opt-pre-relu", "opt-post-proj-relu"])
def test_both_paths_hint_the_residual_stream_of_single_tokens(name: str, tmp_path: Path) -> None:
    pack, heard = converted(name, tmp_path), {}
    tokens = [int(t) for t in read(name).tokens[:9]]
    for layers in ("native", "modules"):
        with flashsparse.load(pack, layers=layers, slots=64) as engine, engine.session() as session:
            session.logits(tokens)  # many at once: nobody is told
            for ffn in engine._ffns:
                ffn.lookahead = Listening()
            expected = session.logits(tokens[:2])
            assert not any(ffn.lookahead.heard for ffn in engine._ffns)
            session.logits(tokens[:1]), session.logits(tokens[1:2])
            heard[layers] = [list(ffn.lookahead.heard) for ffn in engine._ffns]
            session.clear()
            session.logits(tokens)
            np.testing.assert_array_equal([session.logits([t])[0] for t in tokens[:2]], expected)
    shape = (1, engine.manifest.hidden_size)
    for native, modules in zip(heard["native"], heard["modules"], strict=True):
        assert [h.shape for h in native] == [h.shape for h in modules] == [shape, shape]
        assert error(np.array(native), np.array(modules)) < TOLERANCE


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    with pytest.raises(flashsparse.UsageError, match="layers"):
        flashsparse.load(pack, layers="metal")
    with pytest.raises(flashsparse.UsageError, match="native"):
        flashsparse.load(pack, layers="native", kernels="reference")


LOADING = """
import sys
from flashsparse import opening
import time, flashsparse, flashsparse.engine

original, engines = opening.import_libraries, []

def late(family, modules):
    assert not {"mlx", "mlx.core", "mlx_lm", "transformers"} & set(sys.modules)
    pool, deadline = engines[0]._pool, time.monotonic() + 20
    while pool.counters.needed_bytes < int(sys.argv[2]) and time.monotonic() < deadline:
        time.sleep(0.001)
    print(pool.counters.needed_bytes)
    original(family, modules)

def begin(engine, *rest, start=flashsparse.engine.Engine._begin):
    engines.append(engine)
    start(engine, *rest)

opening.import_libraries = late
flashsparse.engine.Engine._begin = begin
with flashsparse.load(sys.argv[1], dram=sys.argv[3], layers=sys.argv[4]) as engine, engine.session() as session:
    session.logits([3])
    print("mlx_lm.models.llama" in sys.modules)
"""


@pytest.mark.parametrize("layers", ["native", "modules"])
def test_resident_weights_are_read_before_any_library_is_imported(layers: str, tmp_path: Path) -> None:
    pack = make_pack(tmp_path)
    header = read_header(pack / "resident.safetensors")
    tensors = max(info.end for info in header.tensors.values()) - header.data_offset
    arguments = [sys.executable, "-c", LOADING, str(pack), str(tensors), "1GB", layers]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
    read, imported = ran.stdout.split()
    assert int(read) >= tensors
    assert imported == str(layers == "modules")


def test_a_budget_that_cannot_work_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashsparse import weights

    def refuse(*args: object) -> None:
        raise AssertionError("reading began")

    pack = make_pack(tmp_path)
    monkeypatch.setattr(weights, "ResidentStore", refuse)
    with pytest.raises(flashsparse.BudgetError):
        flashsparse.load(pack, dram=1)
    with pytest.raises(AssertionError, match="reading began"):
        flashsparse.load(pack)
