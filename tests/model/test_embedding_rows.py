"""An embedding that stays on flash: the same bits as in memory, counted reads, and errors that say what failed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse import FlashReadError, UsageError
from flashsparse.engine import Engine
from flashsparse.flash import ReadPool
from flashsparse.models.tensors import embedding_tensors
from flashsparse.opening import OpenPack, _open_files
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.safetensors import read_header, read_tensor, shape_bytes
from flashsparse.rows import STAGED, EmbeddingRows, embedding_bytes
from flashsparse.stats import Counters
from tests.metal.kinds import converted
from tests.model.packs import make_pack
from tests.model.predict_packs import make_predict_pack

VOCAB = 160
MANY = [int(t) for t in np.random.default_rng(3).permutation(VOCAB)[:130]] + [0, VOCAB - 1, 7, 7, 0]
STEPS = [VOCAB - 1, 0, 44, 44, 91]
KINDS: dict[str, dict[str, Any]] = {
    "f16": {},
    "bf16": {"dtype": "BF16"},
    "f32": {"dtype": "F32"},
    "8-bits": {"bits": 8},
    "4-bits": {"bits": 4},
    "opt": {"family": "opt"},
    "minicpm": {"family": "minicpm", "heads": 8},
    "qwen2": {"family": "qwen2"},
    "compact": {"gate": "compact"},
    "dense": {"tier": "dense", "activation": "silu"},
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("rows"))


def made(kind: str, root: Path) -> Path:
    options = {"vocab": VOCAB, **KINDS[kind]}
    if "tier" in options:
        return make_pack(root, **options)
    return converted(**options)(root)


def digest(pack: Path, **options: Any) -> str:
    """Of the logits of a prompt of three chunks and of decoded tokens."""
    with flashsparse.load(pack, max_kv_size=200, **options) as engine, engine.session() as session:
        rows = [session.logits(part) for part in (MANY, *([token] for token in STEPS))]
        return hashlib.sha256(b"".join(row.tobytes() for row in rows)).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_an_embedding_in_memory(kind: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path)
    expected = digest(path, embeddings="memory")
    assert digest(path, embeddings="flash") == expected
    assert digest(path, embeddings="flash", read_mode="buffered") == expected
    assert digest(path, embeddings="flash", layers="modules") == digest(path, embeddings="memory", layers="modules")


def test_the_bits_of_predicted_and_streamed_layers(tmp_path: Path) -> None:
    path = make_predict_pack(tmp_path)
    for options in ({"slots": 64}, {"slots": 300, "lookahead": "on"}, {"tier": "dense"}):
        assert digest(path, embeddings="flash", **options) == digest(path, embeddings="memory", **options)


def test_the_bits_do_not_depend_on_the_places_or_the_kernels(pack: Path) -> None:
    reference = digest(pack, embeddings="memory", kernels="reference")
    assert digest(pack, embeddings="flash", kernels="reference") == reference
    with flashsparse.load(pack, embeddings="flash") as engine, engine.session() as session:
        found = session.logits(MANY)
        one_by_one = np.concatenate([_again(engine, MANY[:n])[-1:] for n in (1, 2, 90, len(MANY))])
    assert np.array_equal(one_by_one, found[[0, 1, 89, len(MANY) - 1]])


def _again(engine: Engine, ids: list[int]) -> np.ndarray:
    if engine._session is not None:
        engine._session.close()
    with engine.session() as session:
        return session.logits(ids)


def test_every_read_is_counted(pack: Path) -> None:
    with flashsparse.load(pack, embeddings="flash", read_mode="buffered", slots=512, lookahead="off") as engine:
        with engine.session() as session:
            session.logits([5, 9, 5, 0])
            counters, row = engine.counters, 2 * engine.manifest.hidden_size
            assert (counters.embedding_reads, counters.embedding_bytes) == (3, 3 * row)
            session.logits([9])
            assert counters.embedding_reads == 3  # it is in memory
            before = counters.copy()
            session.logits([VOCAB - 1])
            cost = counters - before
            assert (cost.embedding_reads, cost.embedding_bytes) == (1, row)
            assert cost.needed_bytes == row + cost.misses * engine.manifest.record.bytes <= cost.flash_bytes
            assert cost.flash_reads >= 1 and cost.io_wait_s > 0
        assert engine.stats.to_dict()["embeddings"] == "flash"


def test_reads_that_fail_name_file_and_offset(pack: Path, tmp_path: Path) -> None:
    path = shutil.copytree(pack, tmp_path / "pack")
    resident = path / "resident.safetensors"
    info = read_header(resident).tensors["model.embed_tokens.weight"]
    row = info.nbytes // VOCAB
    expected = digest(path, embeddings="memory")
    with flashsparse.load(path, embeddings="flash", max_kv_size=200) as engine:
        data = resident.read_bytes()
        with engine.session() as session, pytest.raises(FlashReadError, match=r"resident\.safetensors") as caught:
            os.truncate(resident, info.begin + 30 * row)
            session.logits([3, 31])
        assert caught.value.path == str(resident)
        assert caught.value.offset <= info.begin + 31 * row < caught.value.offset + caught.value.length
        with resident.open("r+b") as file:
            file.write(data)
        with engine.session() as session:
            rows = [session.logits(part) for part in (MANY, *([token] for token in STEPS))]
    assert hashlib.sha256(b"".join(r.tobytes() for r in rows)).hexdigest() == expected


def test_what_stays_on_flash_is_not_read_when_loading(pack: Path) -> None:
    with flashsparse.load(pack, embeddings="memory") as engine:
        whole = engine._pack.stores[0].nbytes  # type: ignore[union-attr]
    with flashsparse.load(pack, embeddings="flash") as engine:
        assert engine._pool is not None and engine._pack is not None
        (store,) = engine._pack.stores
        left = embedding_bytes(engine.manifest)
        assert engine._pool.counters.needed_bytes <= engine.manifest.files["resident.safetensors"].bytes - left
        assert "model.embed_tokens.weight" not in store and "lm_head.weight" in store
        assert store.nbytes <= engine.plan.resident < whole + engine.plan.resident
        assert engine.plan.on_flash == left == VOCAB * 2 * engine.manifest.hidden_size


def test_a_tied_embedding_stays_in_memory(tmp_path: Path) -> None:
    path = make_pack(tmp_path, tie=True)
    with flashsparse.load(path, slots=64) as engine:
        assert engine.embeddings == "memory" and engine.plan.on_flash == 0
    with pytest.raises(UsageError, match="tied"):
        flashsparse.load(path, embeddings="flash")
    with pytest.raises(UsageError, match="embeddings"):
        flashsparse.load(path, embeddings="ssd")


def test_ids_outside_the_vocabulary_are_refused(pack: Path) -> None:
    with flashsparse.load(pack, embeddings="flash") as engine, engine.session() as session:
        for wrong in (VOCAB, -1):
            with pytest.raises(UsageError):
                session.logits([wrong])
        assert engine.counters.embedding_reads == 0


@pytest.fixture
def table(tmp_path: Path) -> Any:
    """(rows with room for three, their counters, the pack) of an 8-bit embedding."""
    path = make_pack(tmp_path, bits=8)
    opened, counters = OpenPack(Manifest.load(path)), Counters()
    _open_files(opened, "auto")
    with ReadPool(2) as pool:
        yield EmbeddingRows(opened, pool, counters, 3), counters, opened
    opened.close()


def test_rows_used_last_stay(table: tuple[EmbeddingRows, Counters, OpenPack]) -> None:
    rows, counters, opened = table
    stored = [read_tensor(opened.headers[0], name) for name in embedding_tensors(opened.manifest)]
    columns = [rows.weight.data, rows.weight.scales, rows.weight.biases]
    reads = []
    for ids in ([0], [VOCAB - 1, 0], [7, 7], [0, 8], [VOCAB - 1], [0, 7], [1, 2, 3], []):
        before = counters.embedding_reads
        places = rows.places(np.array(ids, np.int32))
        assert places.dtype == np.int32 and len(set(places)) == len(set(ids))
        for column, expected in zip(columns, stored, strict=True):
            assert column is not None and np.array_equal(column[places].view(expected.dtype), expected[ids])
        reads.append((counters.embedding_reads - before) // 3)
    assert reads == [1, 1, 1, 1, 1, 1, 3, 0]  # [8] drops the last row, which drops 7, which drops 8
    for wrong in ([VOCAB], [-1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match=r"expected at most 3|not all in"):
            rows.places(np.array(wrong, np.int32))


def test_more_rows_than_are_read_at_once(pack: Path) -> None:
    opened = OpenPack(Manifest.load(pack))
    _open_files(opened, "direct")
    with ReadPool(4) as pool:
        rows = EmbeddingRows(opened, pool, Counters(), VOCAB)
        ids = np.random.default_rng(1).permutation(VOCAB).astype(np.int32)
        assert len(ids) > 2 * STAGED
        expected = read_tensor(opened.headers[0], "model.embed_tokens.weight")
        assert np.array_equal(rows.weight.data[rows.places(ids)].view(expected.dtype), expected[ids])
        size = shape_bytes("F16", (VOCAB, opened.manifest.hidden_size))
        assert rows.buffer.nbytes == size
    opened.close()
