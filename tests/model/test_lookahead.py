"""Reads ahead: the same bits with and without, whatever arrives, fails or is interrupted; counters that add up."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse import FlashReadError, UsageError, ffn, prefetch
from flashsparse.cache import SlotTable
from flashsparse.engine import Engine
from flashsparse.models import native_step
from flashsparse.native import rounds, steps
from flashsparse.prefetch import NativePrefetch, Norm, Switch
from flashsparse.stats import Counters
from tests.model.packs import make_pack
from tests.model.predict_packs import default_layer, make_predict_pack

PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 160, 20)]
STEPS = [int(t) for t in np.random.default_rng(8).integers(3, 160, 12)]
COPY = default_layer("gate_copy")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_predict_pack(tmp_path_factory.mktemp("lookahead"))


def decode(engine: Engine) -> np.ndarray:
    with engine.session() as session:
        rows = [session.logits(PROMPT)[-1:]]
        rows += [session.logits([token]) for token in STEPS]
    return np.concatenate(rows)


def hint_before_attention(engine: Engine) -> None:
    for layer in engine._ffns:
        assert isinstance(layer.lookahead, NativePrefetch)
        layer.lookahead.early = None


def check_tables(engine: Engine) -> None:
    for layer in engine._ffns:
        assert layer.table is not None and layer.lookahead is not None
        assert layer.table.native.reservation == 0
        layer.table.check()


@pytest.mark.parametrize(
    ("model", "slots"),
    [
        ({}, 60),
        ({}, 512),
        ({"bits": 4}, 300),
        ({"family": "opt"}, 300),
        ({"selection": "topk", "layer": replace(COPY, threshold=None, k=60)}, 128),
        ({"score": "gate"}, 300),
        ({"tier": "exact"}, 300),
        ({"tier": "exact", "gate": "compact"}, 60),
        ({"tier": "exact", "gate": "compact"}, 300),
    ],
    ids=str,
)
def test_output_is_the_same_bits_with_reads_ahead(tmp_path: Path, model: dict[str, Any], slots: int) -> None:
    path = make_pack(tmp_path, **model) if "tier" in model else make_predict_pack(tmp_path, **model)
    results = []
    for mode, early in (("off", True), ("on", True), ("on", False), ("auto", True)):
        with flashsparse.load(path, slots=slots, lookahead=mode) as engine:
            if not early:
                hint_before_attention(engine)
            results.append(decode(engine))
            total = engine.counters
            if mode == "off":
                assert total.prefetched == 0
                continue
            check_tables(engine)
            assert total.prefetch_used <= total.prefetched
            if mode == "on" and slots in (128, 300):
                assert total.prefetch_used > 0
                assert total.overlap_s > 0
    assert all(np.array_equal(results[0], result) for result in results[1:])


def test_other_kernels_read_ahead_in_python(pack: Path) -> None:
    results = []
    for mode in ("off", "on"):
        with flashsparse.load(pack, slots=300, lookahead=mode, kernels="reference") as engine:
            results.append(decode(engine))
            assert all(layer.native is None for layer in engine._ffns)
            total = engine.counters
    assert np.array_equal(*results)
    assert 0 < total.prefetch_used <= total.prefetched


def test_every_byte_is_counted_once(pack: Path) -> None:
    with flashsparse.load(pack, slots=300, lookahead="on") as engine:
        assert engine._pool is not None
        before = engine._pool.counters
        decode(engine)
        after, total = engine._pool.counters, engine.counters
        assert total.flash_reads == after.reads - before.reads
        assert total.flash_bytes >= after.read_bytes - before.read_bytes
        assert 0 < total.prefetched < total.flash_bytes // engine.manifest.record.bytes
        assert total.flash_reads < total.prefetched + total.misses  # neighbours share requests
        record = engine.manifest.record.bytes
        assert total.prefetch_wasted_bytes >= (total.prefetched - total.prefetch_used) * record
        stats = engine.stats.to_dict()
        assert stats["prefetch_useful"] == total.prefetch_used / total.prefetched
        assert stats["lookahead"] == {"mode": "on", "on": True, "with_s": None, "without_s": None}


@pytest.mark.parametrize(("kind", "asked"), [("copy", [0, 0]), ("full", [0, 0]), ("compact", [0, 1, 2, 0, 1, 2])])
def test_layers_whose_scores_are_one_product_begin_under_the_reads_before(
    tmp_path: Path, pack: Path, kind: str, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, heard = pack if kind == "copy" else make_pack(tmp_path, tier="exact", gate=kind), []
    start = NativePrefetch.start
    with flashsparse.load(path, slots=300, lookahead="on") as engine, engine.session() as session:
        layers = {id(layer.lookahead): layer.layer for layer in engine._ffns}

        def hear(lookahead: NativePrefetch, h: np.ndarray) -> None:
            heard.append(layers[id(lookahead)])
            start(lookahead, h)

        monkeypatch.setattr(NativePrefetch, "start", hear)
        session.logits(PROMPT)
        session.logits([5])
        session.logits([6])
        assert heard == asked
        assert engine.counters.prefetch_used > 0
        check_tables(engine)


@pytest.mark.parametrize("guess", ["nothing", "more than fits", "the wrong half"])
def test_wrong_hints_change_no_bits(pack: Path, guess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashsparse.load(pack, slots=300, lookahead="off") as engine:
        expected = decode(engine)
    with flashsparse.load(pack, slots=300, lookahead="on") as engine:
        for layer in engine._ffns:
            assert isinstance(layer.lookahead, NativePrefetch)
            scores = {
                "nothing": np.full(512, np.nan, np.float32),
                "more than fits": np.ones(512, np.float32),
                "the wrong half": (np.arange(512) % 2).astype(np.float32),
            }[guess]
            layer.lookahead.early = None
            monkeypatch.setattr(layer.lookahead.chooser, "guess", lambda x, scores=scores: (scores, 0.5))
        assert np.array_equal(decode(engine), expected)
        check_tables(engine)
        assert (engine.counters.prefetched > 0) == (guess == "the wrong half")


def test_a_read_ahead_that_fails_is_read_again(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashsparse.load(pack, slots=300, lookahead="off", read_mode="buffered") as engine:
        expected = decode(engine)
    whole = {path: path.read_bytes() for path in pack.glob("flash-*")}
    with flashsparse.load(pack, slots=300, lookahead="on", read_mode="buffered") as engine:
        original = ffn.StreamedFFN.hint
        hint_before_attention(engine)

        def hint(layer: ffn.StreamedFFN, h: np.ndarray) -> None:
            """The file ends early until the reads ahead are over."""
            path = Path(layer.flash.file.path)
            os.truncate(path, len(whole[path]) // 2)
            original(layer, h)
            time.sleep(0.02)
            with path.open("r+b") as file:
                file.write(whole[path])

        monkeypatch.setattr(ffn.StreamedFFN, "hint", hint)
        assert np.array_equal(decode(engine), expected)
        check_tables(engine)
        total, record = engine.counters, engine.manifest.record.bytes
        assert total.needed_bytes > (total.misses + total.prefetch_used) * record > 0  # some were read twice


class Arriving:
    """A batch of which the second part cannot be made whole, and the third would be."""

    def __init__(self) -> None:
        self.left: list[np.ndarray | None] = [np.arange(2), None, np.arange(4, 6)]
        self.released = 0

    def take(self, least: int) -> np.ndarray:
        assert not self.released
        found = self.left.pop(0)
        if found is None:
            raise FlashReadError("record 3 cannot be decompressed", "", 3, 0, 0)
        return found

    def release(self) -> None:
        self.released += 1


def test_after_a_failure_nothing_lands_any_more() -> None:
    """The round reads again what it needs, into the same slots: what arrives later must leave them alone."""
    table, batch = SlotTable(10, 8), Arriving()
    reservation = table.reserve(np.arange(6), np.empty(0, np.int32))
    ahead: Any = prefetch.Ahead(reservation, batch, None)  # type: ignore[arg-type]
    assert ahead.take().tolist() == [0, 1]
    assert len(ahead.take()) == 0 and batch.released
    assert len(ahead.take()) == 0 and len(batch.left) == 1
    ahead.close()
    table.settle(reservation, ahead.arrived)
    assert table.resident().tolist() == [0, 1]
    table.check()


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line that runs in the files that read ahead, as a signal would."""

    FILES = (prefetch.__file__, ffn.__file__, rounds.__file__, steps.__file__, native_step.__file__)

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, frame: FrameType, event: str, _: object) -> Interrupt | None:
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_costs_no_bits(pack: Path) -> None:
    with flashsparse.load(pack, slots=300, lookahead="off") as engine, engine.session() as session:
        expected = session.logits(PROMPT[:2])[-1:]
        expected = np.concatenate([expected, *(session.logits([token]) for token in STEPS[:2])])
    kept, after, interrupt = [], 0, Interrupt(0)
    with flashsparse.load(pack, slots=300, lookahead="on") as engine:
        while interrupt.left <= 0:
            after += 7
            interrupt = Interrupt(after)
            with engine.session() as session:
                session.logits(PROMPT[:2])
                try:
                    with interrupt:
                        session.logits(STEPS[:1])
                    rest = STEPS[1:2]
                except KeyboardInterrupt as error:
                    kept.append(error)  # its traceback keeps rounds and batches alive
                    rest = STEPS[session.fed - 2 : 2] if session.fed > 2 else [STEPS[1]]
                assert np.array_equal(session.logits(rest)[-1], expected[-1])
    assert after > 100


def test_auto_goes_by_what_tokens_cost() -> None:
    for gain in (0.5, 2.0):
        counters = Counters()
        switch, seen = Switch("auto", counters), []
        for _ in range(200):
            on = switch.on
            seen.append(on)
            counters.ffn_s += gain if on else 1.0
            counters.steps += 1
            counters.tokens += 1
        assert switch.on in (True, False)
        assert switch.pays == (gain < 1)
        assert 0.9 < np.mean(np.array(seen[20:]) == (gain < 1)) < 1  # one in 16 goes the other way
    assert not Switch("auto", Counters()).pays
    assert Switch("on", Counters()).on and not Switch("off", Counters()).on


def test_prompts_are_not_compared() -> None:
    counters = Counters()
    switch = Switch("auto", counters)
    for _ in range(20):
        counters.steps, counters.tokens, counters.ffn_s = counters.steps + 1, counters.tokens + 7, counters.ffn_s + 1
        assert switch.on in (True, False)
    assert switch.to_dict() == {"mode": "auto", "on": False, "with_s": None, "without_s": None}


@pytest.mark.parametrize("layer", [True, False])
def test_the_norm_is_its_formula(layer: bool) -> None:
    rng = np.random.default_rng(3)
    h, weight, bias = rng.standard_normal((1, 33)), rng.standard_normal(33), rng.standard_normal(33)
    centred = h - h.mean() if layer else h
    expected = centred / np.sqrt((centred**2).mean() + 1e-5) * weight + bias
    norm = Norm(weight.astype(np.float32), bias.astype(np.float32), 1e-5, layer)
    assert np.allclose(norm(h.astype(np.float32)), expected, atol=1e-5)


def test_layers_without_a_use_for_hints_have_none(tmp_path: Path, pack: Path) -> None:
    with flashsparse.load(pack, lookahead="off") as engine:
        assert not any(isinstance(layer.lookahead, NativePrefetch) or layer.wants_hint for layer in engine._ffns)
    with flashsparse.load(pack, tier="dense", lookahead="on") as engine:
        assert not any(layer.wants_hint for layer in engine._ffns)
    with pytest.raises(UsageError, match="lookahead"):
        flashsparse.load(pack, lookahead="maybe")
