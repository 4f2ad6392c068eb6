"""Resident weights that arrive while the first layers compute: the same bits, in order, within the budget; failures."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse import FlashReadError, SessionError, weights
from flashsparse.flash import Batch, ReadPool
from flashsparse.loading import FIRST, Loading, stage_of
from flashsparse.native.layers import Layer
from flashsparse.pack.safetensors import TensorInfo, read_header
from tests.model.packs import make_pack
from tests.model.predict_packs import make_predict_pack

PROMPT = [int(t) for t in np.random.default_rng(3).integers(3, 160, 21)]
WIDE: dict[str, Any] = {"hidden": 128}  # weights of a layer are several pieces
MAKERS: dict[str, Callable[[Path], Path]] = {
    "exact": lambda root: make_pack(root, tier="exact", **WIDE),
    "compact": lambda root: make_pack(root, tier="exact", gate="compact", **WIDE),
    "quantized": lambda root: make_pack(root, tier="exact", bits=4, **WIDE),
    "tied": lambda root: make_pack(root, tier="exact", tie=True, **WIDE),
    "predict": lambda root: make_predict_pack(root, **WIDE),
    "low_rank": lambda root: make_predict_pack(root, score="low_rank", **WIDE),
    "gate_up_copy": lambda root: make_predict_pack(root, score="gate_up_copy", **WIDE),
    "opt": lambda root: make_pack(root, tier="exact", family="opt", **WIDE),
}


class Late:
    """A batch that begins when it is waited for."""

    def __init__(self, begin: Callable[[], Batch], reads: int, told: Callable[[str], None]) -> None:
        self._begin, self._told, self.reads = begin, told, reads
        self._batch: Batch | None = None

    def wait(self) -> None:
        if self._batch is None:
            self._batch, self.reads = self._begin(), 0
        self._batch.wait()
        self._told("read")

    def check(self) -> None:
        pass

    def release(self) -> None:
        if self._batch is not None:
            self._batch.release()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens: each stage of the resident weights is "read" when it is waited for, and layers "attend"."""
    found: list[str] = []
    held: list[Late] = []
    submit, attend = ReadPool.submit, Layer.attend

    def late(pool: ReadPool, *arguments: Any, later: bool = False) -> Any:
        if not later:
            return submit(pool, *arguments)
        held.append(Late(partial(submit, pool, *arguments), len(arguments[1]), found.append))
        return held[-1]

    def attended(layer: Layer, *arguments: Any) -> None:
        found.append("attend")
        attend(layer, *arguments)

    monkeypatch.setattr(weights, "READ_BYTES", weights.ALIGNMENT)
    monkeypatch.setattr(ReadPool, "submit", late)
    monkeypatch.setattr(ReadPool, "pause", lambda _: sum(batch.reads for batch in held))
    monkeypatch.setattr(Layer, "attend", attended)
    return found


def digest(path: Path, calls: list[list[int]]) -> bytes:
    with flashsparse.load(path, slots=100, max_kv_size=64) as engine, engine.session() as session:
        rows = [session.logits(call) for call in calls]
        assert engine.peak_memory() - engine.runtime_bytes <= engine.plan.budget
    return b"".join(row.tobytes() for row in rows)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_bits_are_the_same(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = MAKERS[kind](tmp_path)
    ways = [[PROMPT, [5], PROMPT[:3]], [[7], PROMPT]]
    expected = [digest(path, calls) for calls in ways]
    events = request.getfixturevalue("events")
    assert [digest(path, calls) for calls in ways] == expected
    assert events.count("read") >= 2 * 4


def test_a_layer_computes_before_the_weights_of_the_next_are_read(tmp_path: Path, events: list[str]) -> None:
    with flashsparse.load(MAKERS["predict"](tmp_path), slots=100) as engine, engine.session() as session:
        assert events == ["read"]  # what building needs
        session.logits(PROMPT)
        assert events == ["read"] + ["read", "attend"] * 3 + ["read"]
        assert engine.counters.io_wait_s > 0
        session.logits(PROMPT)
        assert events[8:] == ["attend"] * 3


@pytest.mark.parametrize("options", [{"layers": "modules"}, {"kernels": "reference"}], ids=["modules", "reference"])
def test_other_layers_wait_for_everything(options: dict[str, Any], tmp_path: Path, events: list[str]) -> None:
    with flashsparse.load(MAKERS["exact"](tmp_path), slots=100, **options) as engine, engine.session() as session:
        assert events == ["read"] * 5
        session.logits(PROMPT)
        assert len(events) == 5


def test_every_tensor_has_come_at_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", weights.ALIGNMENT)
    with flashsparse.load(MAKERS["predict"](tmp_path), slots=100) as engine:
        assert engine._pack is not None
        layers, seen = engine.manifest.layers, set()
        for store in engine._pack.stores:
            pieces = store.pieces(lambda info: stage_of(info, layers))
            assert pieces["need"].sum() == sum(nbytes for _, nbytes in store.stretches)
            for name, info in read_header(Path(store.file.path)).tensors.items():
                if name in store:
                    ends = pieces["offset"] + pieces["need"]
                    brought = pieces["stage"][(pieces["offset"] < info.end) & (ends > info.begin)]
                    assert len(brought) and brought.max() <= stage_of(info, layers)
                    seen.add(stage_of(info, layers))
        assert seen == set(range(layers + 2))


@pytest.mark.parametrize(
    ("name", "shape", "stage"),
    [
        ("model.embed_tokens.weight", (9, 4), FIRST),
        ("model.layers.11.self_attn.q_proj.weight", (4, 4), 12),
        ("model.layers.11.input_layernorm.weight", (4,), FIRST),
        ("layers.3.gate.scales", (9, 1), 4),
        ("model.decoder.layers.0.fc1.weight", (9, 4), 1),
        ("model.decoder.embed_positions.weight", (9, 4), FIRST),
        ("model.decoder.project_in.weight", (4, 2), FIRST),
        ("model.decoder.project_out.weight", (2, 4), 21),
        ("model.norm.weight", (4,), FIRST),
        ("lm_head.scales", (9, 1), 21),
    ],
)
def test_stages(name: str, shape: tuple[int, ...], stage: int) -> None:
    assert stage_of(TensorInfo(name, "F16", shape, 0, 0), 20) == stage


@pytest.mark.parametrize("calls", [[PROMPT], [[7]]], ids=["prompt", "token"])
def test_a_late_read_that_fails_is_raised_and_closes_the_engine(
    calls: list[list[int]], tmp_path: Path, events: list[str]
) -> None:
    path = MAKERS["exact"](tmp_path)
    resident = path / "resident.safetensors"
    data, info = resident.read_bytes(), read_header(resident).tensors["model.layers.2.self_attn.q_proj.weight"]
    threads = threading.active_count()
    with flashsparse.load(path, slots=100) as engine, engine.session() as session:
        assert engine._pack is not None and engine._pack.loading is not None
        loading = engine._pack.loading
        os.truncate(resident, info.end - 4096)
        with pytest.raises(FlashReadError, match=r"resident\.safetensors.* the file ends") as failed:
            session.logits(calls[0])
        assert failed.value.offset < info.end <= failed.value.offset + failed.value.length
        assert engine._pool is None and engine._pack is not None
        assert engine._pack.loading is None and not engine._pack.stores and not loading._batches
        assert session.closed
        with pytest.raises(SessionError, match="closed"):
            session.logits([3])
        with pytest.raises(SessionError, match="closed"):
            engine.session()
    assert threading.active_count() == threads
    resident.write_bytes(data)
    assert len(digest(path, [PROMPT]))


def test_a_read_that_has_failed_when_loading_ends_is_raised_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", weights.ALIGNMENT)
    path = MAKERS["exact"](tmp_path)
    resident = path / "resident.safetensors"
    end, submit = read_header(resident).tensors["lm_head.weight"].end, ReadPool.submit
    wait = Loading.wait

    def all_over(loading: Loading, stage: int | None = None) -> None:
        wait(loading, stage)
        for batch in loading._batches.values():  # the head's fails, and nobody has asked for it
            with contextlib.suppress(FlashReadError):
                batch.wait()

    monkeypatch.setattr(Loading, "wait", all_over)

    def truncate(pool: ReadPool, *arguments: Any, later: bool = False) -> Batch:
        if later and resident.stat().st_size >= end:
            os.truncate(resident, end - weights.ALIGNMENT)
        return submit(pool, *arguments, later=later)

    monkeypatch.setattr(ReadPool, "submit", truncate)
    threads = threading.active_count()
    with pytest.raises(FlashReadError, match=r"resident\.safetensors"):
        flashsparse.load(path, slots=100)
    assert threading.active_count() == threads


def test_an_interrupted_wait_changes_nothing(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = MAKERS["predict"](tmp_path)
    expected = digest(path, [PROMPT])
    wait = Loading.wait

    def struck(loading: Loading, stage: int | None = None) -> None:
        if stage == 2:
            raise KeyboardInterrupt
        wait(loading, stage)

    with flashsparse.load(path, slots=100, max_kv_size=64) as engine, engine.session() as session:
        with monkeypatch.context() as patch:
            patch.setattr(Loading, "wait", struck)
            with pytest.raises(KeyboardInterrupt):
                session.logits(PROMPT)
        session.clear()
        assert session.logits(PROMPT).tobytes() == expected


def test_closing_drops_what_is_still_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", weights.ALIGNMENT)
    path, submit = MAKERS["predict"](tmp_path), ReadPool.submit

    def held(pool: ReadPool, *arguments: Any, later: bool = False) -> Batch:
        batch = submit(pool, *arguments, later=later)
        if later and len(held_back) == 0:
            batch.wait()  # what building needs
            pool.pause()
        held_back.append(batch)
        return batch

    held_back: list[Batch] = []
    monkeypatch.setattr(ReadPool, "submit", held)
    monkeypatch.setattr(ReadPool, "resume", lambda _: None)
    threads = threading.active_count()
    engine = flashsparse.load(path, slots=100)
    waiting = len(held_back[-1])
    assert engine._pool is not None and engine._pool.pause() >= waiting > 0
    assert engine._pack is not None and engine._pack.loading is not None
    loading, stores = engine._pack.loading, [weakref.ref(store) for store in engine._pack.stores]
    engine.close()
    assert not loading._batches
    with pytest.raises(ValueError, match="dropped"):
        loading.wait()
    del loading
    gc.collect()
    assert not any(store() for store in stores)  # a closed engine keeps no weights
    assert not any(batch._open for batch in held_back)
    assert threading.active_count() == threads
