"""A head start of the next layer's reads: the same bits, records read once, nothing stale, failures named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse import FlashReadError, ffn
from flashsparse.flash import Load
from flashsparse.headstart import HeadStart, worth
from tests.model.packs import make_pack
from tests.model.predict_packs import make_predict_pack

PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 160, 70)]
OTHER = [int(t) for t in np.random.default_rng(8).integers(3, 160, 33)]


def packs(root: Path) -> dict[str, Path]:
    return {
        "exact": make_pack(root, "exact", tier="exact"),
        "dense": make_pack(root, "dense", tier="dense"),
        "predict": make_predict_pack(root, "predict", bits=4),
    }


def prompt(path: Path, ahead: bool, **options: Any) -> tuple[np.ndarray, int, int]:
    """Logits of two prompts and a token, bytes that were needed, and records that were read."""
    with flashsparse.load(path, slots=options.pop("slots", 80), **options) as engine, engine.session() as session:
        for layer in engine._ffns:
            layer.ahead = ahead
        rows = [session.logits(PROMPT), session.logits(OTHER), session.logits([5])]
        return np.concatenate(rows), engine.counters.needed_bytes, engine.counters.misses


@pytest.mark.parametrize("tier", ["exact", "dense", "predict"])
@pytest.mark.parametrize("tile", [None, 40_000])
def test_the_bits_are_the_same_and_no_record_is_needed_twice(
    tmp_path: Path, tier: str, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    use = HeadStart.use

    def counted(self: HeadStart, *arguments: Any) -> Any:
        result = use(self, *arguments)
        used.append(0 if result[2] is None else result[2].last)
        return result

    monkeypatch.setattr(HeadStart, "use", counted)
    monkeypatch.setattr(ffn, "worth", lambda *_: True)
    if tile is not None:  # several tiles in a layer
        monkeypatch.setattr("flashsparse.sizes.MAX_TILE_BYTES", tile)
        monkeypatch.setattr("flashsparse.sizes.MIN_TILE_BYTES", tile)
    path = packs(tmp_path)[tier]
    for mode in ("direct", "buffered"):
        expected = prompt(path, False, read_mode=mode)
        assert not used
        found = prompt(path, True, read_mode=mode)
        assert sum(used) > 0
        used.clear()
        assert np.array_equal(found[0], expected[0])
        assert found[1:] == expected[1:]


def test_what_an_interrupted_step_has_begun_is_not_taken_for_another_layer_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffn, "worth", lambda *_: True)
    path = packs(tmp_path)["exact"]
    expected = prompt(path, False)[0]
    with flashsparse.load(path, slots=80) as engine, engine.session() as session:
        for at in range(engine.manifest.layers):
            with monkeypatch.context() as patch:
                patch.setattr(engine._ffns[at].chooser, "choose", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    session.logits(OTHER)
            session.clear()
            rows = [session.logits(PROMPT), session.logits(OTHER), session.logits([5])]
            assert np.array_equal(np.concatenate(rows), expected)
            session.clear()


def test_a_file_that_ends_early_is_named_and_the_session_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffn, "worth", lambda *_: True)
    path = packs(tmp_path)["dense"]
    victim = path / "flash-001.safetensors"
    data = victim.read_bytes()
    with flashsparse.load(path, read_mode="buffered") as engine, engine.session() as session:
        expected = session.logits(PROMPT)
        session.clear()
        with victim.open("r+b") as file:
            file.truncate(20000)
        with pytest.raises(FlashReadError, match=r"flash-001\.safetensors"):
            session.logits(PROMPT)
        victim.write_bytes(data)
        session.clear()
        assert np.array_equal(session.logits(PROMPT), expected)


def test_only_layers_read_nearly_whole_are_worth_it() -> None:
    def load(begin: int, *lengths: int) -> Load:
        starts = begin + np.cumsum([0, *(2 * length for length in lengths[:-1])])
        sizes, none = np.array(lengths), np.empty(0, np.int64)
        return Load(0, 1, none, starts, sizes, sizes, none)

    assert worth([load(0, 100), load(100, 100)], 0.3)
    assert worth([load(0, 100), load(200, 100)], 0.3)
    assert not worth([load(0, 100), load(400, 100)], 0.3)
    assert worth([load(0, 100), load(400, 100)], 0.6)
    assert worth([], 0.6)
    assert not worth([], 0.3)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
