"""The device curve: measured on real files, kept for its device, and what follows from its figures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashsparse import FlashReadError, FlashSparseError
from flashsparse.flash import FlashFile, Merging, curve, probe
from flashsparse.flash.curve import DEPTHS, SIZES, Curve, cached_path, load_curve, save_curve
from flashsparse.flash.plan import SEPARATE
from flashsparse.flash.probe import measure


def made(request_s: float, bytes_per_s: float, device: str = "") -> Curve:
    """A drive that takes `request_s` for each request and then moves `bytes_per_s`, whatever is in flight."""
    rates = tuple((size / (request_s + size / bytes_per_s),) * len(DEPTHS) for size in SIZES)
    return Curve(device, rates, None, bytes_per_s)


def test_measuring_reads_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "POINT_S", 0.001)
    found = measure(tmp_path, size=16 << 20)
    assert not list(tmp_path.iterdir())
    assert found.sequential > 0
    for rates in (found.direct, found.buffered):
        assert rates is None or (np.array(rates).shape == (len(SIZES), len(DEPTHS)) and (np.array(rates) > 0).all())
    save_curve(found, tmp_path / "cache", tmp_path)
    assert load_curve(tmp_path / "cache", tmp_path) == found


def test_without_room_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(FlashSparseError, match=r"temporary file of .* make room, or name a folder"):
        measure(tmp_path, size=1 << 60)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"version": 1}', "x" * 100])
def test_a_damaged_cache_is_no_curve(tmp_path: Path, damage: str) -> None:
    path = cached_path(tmp_path, tmp_path)
    assert load_curve(tmp_path, tmp_path) is None
    path.parent.mkdir()
    path.write_text(damage)
    assert load_curve(tmp_path, tmp_path) is None


@pytest.mark.parametrize(
    "key,value",
    [("device", "another"), ("direct", [[1.0]]), ("sequential", -1), ("sequential", 10**400), ("measured", 0),
     ("spread", None), ("version", 0)],
)  # fmt: skip
def test_a_curve_of_another_device_or_shape_is_no_curve(tmp_path: Path, key: str, value: object) -> None:
    save_curve(made(1e-5, 1e9, curve.device_name(tmp_path)), tmp_path, tmp_path)
    assert load_curve(tmp_path, tmp_path) is not None
    path = cached_path(tmp_path, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert load_curve(tmp_path, tmp_path) is None


def test_the_gap_costs_what_the_request_does() -> None:
    """10 microseconds are 10,000 bytes of a drive that moves 1 GB/s; measured at 128 KiB it moves a little less."""
    merging = made(1e-5, 1e9).merging(8192)
    assert merging.gap == pytest.approx(10_000, rel=0.15)
    assert made(0, 1e9).merging(8192) == SEPARATE
    assert isinstance(merging, Merging)


def test_rates_between_the_measured_sizes() -> None:
    drive = made(1e-5, 1e9)
    for size in (512, 4096, 6912, 24576, 1 << 20, 5 << 20):
        expected = size / (1e-5 + size / 1e9)
        assert drive.best(size) == pytest.approx(expected, rel=0.05) or size < 4096 or size > 1 << 20
    assert drive.best(512) == pytest.approx(drive.best(4096) / 8)
    assert drive.best(5 << 20) == drive.best(1 << 20)


def test_depth_is_the_least_that_is_fast_enough() -> None:
    row = (1.0, 2.0, 4.0, 7.8, 8.0, 8.0)
    assert Curve("", (row,) * len(SIZES), None, 1.0).depth(6912) == 8


@pytest.mark.parametrize(
    "row,size,threads",
    [
        ((1.0, 2.0, 4.0, 7.8, 16.0, 16.0), 6912, 16),
        ((1.0, 2.0, 4.0, 7.8, 16.0, 32.0), 6912, 32),
        ((1.0, 2.0, 3.0, 3.0, 3.0, 3.0), 6912, 16),  # a slow minute's: more in flight would do no harm
        ((1.0, 2.0, 4.0, 4.0, 2.0, 2.0), 6912, 8),  # more clearly harm
        ((1.0, 2.0, 3.0, 3.0, 3.0, 3.0), 64 << 10, 8),
    ],
)
def test_threads_are_the_depth_but_not_too_few(row: tuple[float, ...], size: int, threads: int) -> None:
    assert Curve("", (row,) * len(SIZES), None, 1.0).threads(size) == threads


def test_rates_at_a_depth() -> None:
    drive = Curve("", ((1e8, 2e8, 3e8, 4e8, 5e8, 6e8),) * len(SIZES), None, 1e9)
    assert drive.at(8192, 2, "direct") == pytest.approx(2e8)
    assert drive.at(10_000, 24**0.5, "direct") == pytest.approx(3.29e8, rel=0.01)
    assert drive.at(8192, 100, "direct") == pytest.approx(6e8)
    assert drive.at(8192, 2, "buffered") is None


def test_what_speaks_against_a_curve() -> None:
    good = replace(made(1e-5, 1e9), measured=1e9)
    assert good.doubts(1e9 + 86400) == []
    assert good.doubts(1e9 + 31 * 86400) == ["measured 31 days ago"]
    falling = tuple((rate, rate, rate, rate, rate, 0.4 * rate) for rate, *_ in good.direct or ())
    shrinking = tuple(reversed(good.direct or ()))
    for bad, reason in (
        (replace(good, spread=2.1), "two passes were 2.1 times apart"),
        (replace(good, sequential=1e8), "in order was less than half"),
        (replace(good, direct=falling), "9 sizes lost half"),
        (replace(good, direct=shrinking), "128 KiB moved less"),
    ):
        assert len(bad.doubts(1e9)) == 1 and reason in bad.doubts(1e9)[0]


def test_both_modes_are_measured_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def point(loop: probe.Loop, file: FlashFile, *_: object) -> float | None:
        asked.append(file.direct)
        return 1.0

    monkeypatch.setattr(probe, "_point", point)
    monkeypatch.setattr(probe.Loop, "rate", lambda *_: 1.0)
    found = measure(tmp_path, size=16 << 20)
    turns = (True, False) if found.direct else (False,)
    assert asked == list(turns) * (2 * len(SIZES) * len(DEPTHS))
    assert found.buffered is not None
    assert found.spread == 1.0


@pytest.mark.parametrize(
    "speeds,passes,spread", [((1.0, 1.2), 2, 1.2), ((0.1, 1.0, 1.1), 3, 1.1), ((0.1, 1.0, 0.2, 0.4), 4, 2.5)]
)
def test_passes_are_repeated_until_two_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speeds: tuple[float, ...], passes: int, spread: float
) -> None:
    asked: list[int] = []

    def point(loop: probe.Loop, file: FlashFile, *_: object) -> float | None:
        asked.append(1)
        return speeds[(len(asked) - 1) // (len(SIZES) * len(DEPTHS))] if not file.direct else None

    monkeypatch.setattr(probe, "_opened", only_buffered)
    monkeypatch.setattr(probe, "_point", point)
    monkeypatch.setattr(probe.Loop, "rate", lambda *_: 1.0)
    found = measure(tmp_path, size=16 << 20)
    assert len(asked) == passes * len(SIZES) * len(DEPTHS)
    assert found.spread == pytest.approx(spread)
    assert found.buffered is not None and found.buffered[0][0] == max(speeds)
    assert bool(found.doubts()) == (spread > curve.DOUBTFUL)


@contextlib.contextmanager
def only_buffered(paths: list[Path]) -> Iterator[dict[str, list[FlashFile]]]:
    with FlashFile(paths[0], "buffered") as file:
        yield {"buffered": [file]}


def test_a_cache_that_cannot_be_emptied_has_no_buffered_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_point", lambda loop, file, *_: 5.0 if file.direct else None)
    monkeypatch.setattr(probe.Loop, "rate", lambda *_: 1.0)
    with FlashFile(__file__) as file:
        if not file.direct:
            pytest.skip("direct reads are refused here")
    assert measure(tmp_path, size=16 << 20).buffered is None
    monkeypatch.setattr(probe, "_point", lambda *_: None)
    with pytest.raises(FlashSparseError, match="no curve"):
        measure(tmp_path, size=16 << 20)


def test_buffered_has_to_win_clearly() -> None:
    drive = made(1e-5, 1e9)
    assert Curve("", drive.direct, made(1e-5, 1.2e9).direct, 1.0).mode == "direct"
    assert Curve("", drive.direct, made(5e-6, 2e9).direct, 1.0).mode == "buffered"
    assert Curve("", None, drive.direct, 1.0).mode == "buffered"


def test_emptying_the_page_cache_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with FlashFile(path, "buffered") as file:
        path.read_bytes()
        assert probe.cached_share(file) > 0.99
        if probe.empty_cache(file):
            assert probe.cached_share(file) < 0.01


def test_reading_past_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with FlashFile(path, "buffered") as file, probe.Loop(8192) as loop:
        with pytest.raises(FlashReadError, match="measuring reads failed"):
            loop.rate(file, np.array([4096]), 8192, 1, 1.0)
        with pytest.raises(ValueError, match="2 reads of 8192 bytes"):
            loop.rate(file, np.array([0]), 8192, 2, 1.0)
