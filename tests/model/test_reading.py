"""A pack is read as its drive's curve says, unless the caller says otherwise; the bits are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flashsparse
from flashsparse.flash import FlashFile
from flashsparse.flash.curve import DEPTHS, SIZES, Curve, cached_path, device_name, save_curve
from flashsparse.machine import IO_THREADS, SMALL_LAYER, read_threads
from tests.model.packs import make_pack

PROMPT = list(range(3, 30))


def drive(folder: Path, depth: int, faster: str) -> Curve:
    """A drive that needs `depth` reads in flight and is twice as fast in one mode."""
    row = tuple(1e8 * min(reads, depth) for reads in DEPTHS)
    slow, fast = (row,) * len(SIZES), (tuple(2 * rate for rate in row),) * len(SIZES)
    direct, buffered = (fast, slow) if faster == "direct" else (slow, fast)
    return Curve(device_name(folder), direct, buffered, 1e9)


def run(pack: Path, **options: object) -> tuple[np.ndarray, int, str]:
    with flashsparse.load(pack, slots=100, **options) as engine, engine.session() as session:  # type: ignore[arg-type]
        assert engine._pool is not None
        return session.logits(PROMPT), engine._pool.threads, engine.read_mode


def test_the_curve_is_applied_and_options_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack, cache = make_pack(tmp_path, tier="exact"), tmp_path / "cache/flashsparse"
    with FlashFile(pack / "pack.json") as file:
        unknown = "direct" if file.direct else "buffered"
    expected, threads, mode = run(pack)
    assert (threads, mode) == (IO_THREADS, unknown)
    for depth, faster in ((4, "buffered"), (32, "direct")):
        save_curve(drive(pack, depth, faster), cache, pack)
        found, threads, mode = run(pack)
        assert (threads, mode) == (IO_THREADS, "buffered" if faster == "buffered" else unknown)
        assert np.array_equal(found, expected)
        found, threads, mode = run(pack, io_threads=3, read_mode="direct")
        assert (threads, mode) == (3, unknown)
        assert np.array_equal(found, expected)
        assert run(pack, read_mode="buffered")[2] == "buffered"


def test_only_large_layers_get_more_threads_than_without_a_curve(tmp_path: Path) -> None:
    curve = drive(make_pack(tmp_path, tier="exact"), 32, "direct")
    assert read_threads(None, curve, 4096, SMALL_LAYER) == 32
    assert read_threads(None, curve, 4096, SMALL_LAYER - 1) == IO_THREADS
    assert read_threads(40, curve, 4096, 1) == 40


def test_a_damaged_curve_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack = make_pack(tmp_path, tier="exact")
    path = cached_path(tmp_path / "cache/flashsparse", pack)
    path.parent.mkdir(parents=True)
    path.write_text("[1")
    assert run(pack)[1] == IO_THREADS
