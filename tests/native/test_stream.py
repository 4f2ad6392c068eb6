"""The streaming plan: every record reaches its place in a tile, once, and gaps are read where that costs less."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flashsparse import FlashReadError
from flashsparse.flash import TYPICAL, Costs, FlashFile, ReadPool, loads
from flashsparse.flash.curve import SIZES, Curve
from flashsparse.flash.stream import CLEARLY, GAPS, SPLIT, best_gap
from tests.native.test_reader import Memory

RECORDS, OFFSET, STRIDE, SIZE = 900, 16384, 6976, 6973
FREE, DEAR = Costs((0, SPLIT), (0.0, 1.0)), Costs((0, SPLIT), (1.0, 1.0 + 1e-9))  # requests that cost nothing, and all


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, OFFSET + RECORDS * STRIDE).astype(np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, content: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("stream") / "flash-000.safetensors"
    path.write_bytes(content.tobytes())
    return path


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("costs", [FREE, TYPICAL, DEAR], ids=["free", "typical", "dear"])
@pytest.mark.parametrize(("tile", "most"), [(4 * 16384, 900), (1 << 20, 7), (8 << 20, 900)])
def test_every_record_arrives_once(
    path: Path, content: np.ndarray, mode: str, share: float, costs: Costs, tile: int, most: int
) -> None:
    ids = np.flatnonzero(np.random.default_rng(2).random(RECORDS) < share)
    positions, memory, seen = OFFSET + ids * STRIDE, Memory(tile), 0
    with FlashFile(path, mode) as file, ReadPool(4) as pool:
        for load in loads(file, positions, SIZE, costs, tile, most):
            assert load.first == seen and seen < load.last <= seen + most
            assert (load.places + load.lengths).max() <= tile and load.lengths.max() <= SPLIT
            with pool.submit(file, load.starts, load.lengths, load.needs, memory.address + load.places) as batch:
                batch.wait()
            for offset, position in zip(load.offsets, positions[load.first : load.last], strict=True):
                assert np.array_equal(memory.bytes[offset : offset + SIZE], content[position : position + SIZE])
            seen = load.last
        assert pool.counters.needed_bytes >= len(ids) * SIZE
    assert seen == len(ids)


def test_no_records_no_loads(path: Path) -> None:
    with FlashFile(path) as file:
        assert loads(file, np.empty(0, np.int64), SIZE, TYPICAL, 1 << 20, 10) == []


def test_requests_without_a_price_bring_nothing_in_vain(path: Path) -> None:
    ids = np.arange(0, RECORDS, 3)
    with FlashFile(path, "buffered") as file:
        exact = loads(file, OFFSET + ids * STRIDE, SIZE, FREE, 8 << 20, RECORDS)
        whole = loads(file, OFFSET + ids * STRIDE, SIZE, DEAR, 8 << 20, RECORDS)
    assert sum(load.nbytes for load in exact) == len(ids) * SIZE
    assert sum(load.nbytes for load in whole) == (ids[-1] - ids[0]) * STRIDE + SIZE


@pytest.mark.parametrize("costs", [FREE, TYPICAL, DEAR, Costs((4096, 65536, SPLIT), (1.0, 1.0, 9.0))])
def test_the_gap_is_the_shortest_that_none_beats_clearly(costs: Costs) -> None:
    rng = np.random.default_rng(5)
    starts = np.cumsum(rng.geometric(0.2, 300)) * 8192
    ends = starts + 8192

    def cost(gap: int) -> float:
        runs = np.split(np.arange(300), np.flatnonzero(starts[1:] - ends[:-1] > gap) + 1)
        return costs.of(np.array([ends[run[-1]] - starts[run[0]] for run in runs]))

    found, least = best_gap(costs, starts, ends), min(map(cost, GAPS))
    assert cost(found) <= CLEARLY * least * (1 + 1e-9)
    assert all(cost(gap) > CLEARLY * least * (1 - 1e-9) for gap in GAPS if gap < found)


def test_costs_follow_the_curve() -> None:
    """A drive with 10,000 requests a second and 1 GB/s, 2 GB/s in order."""
    rates = tuple((size / max(1e-4, size / 1e9),) * 6 for size in SIZES)
    costs = Curve("", rates, None, 2e9).costs()
    assert costs.of(np.array([4096, 8192])) == pytest.approx(2e-4)
    assert costs.of(np.array([1 << 20])) == pytest.approx((1 << 20) / 1e9)
    assert costs.of(np.array([5 << 20])) == pytest.approx((1 << 20) / 1e9 + (4 << 20) / 2e9)
    noisy = ((1e6,) * 6, *rates[1:])  # a smaller read never costs more than a larger one
    assert list(Curve("", noisy, None, 2e9).costs().costs) == sorted(Curve("", noisy, None, 2e9).costs().costs)


def test_a_file_that_ends_early_is_an_error(path: Path, tmp_path: Path, content: np.ndarray) -> None:
    short = tmp_path / "short"
    short.write_bytes(content.tobytes())
    memory, positions = Memory(8 << 20), OFFSET + np.arange(RECORDS) * STRIDE
    with FlashFile(short) as file, ReadPool(2) as pool:
        (load,) = loads(file, positions, SIZE, TYPICAL, 8 << 20, RECORDS)
        os.truncate(short, OFFSET + 700 * STRIDE)
        batch = pool.submit(file, load.starts, load.lengths, load.needs, memory.address + load.places)
        with batch, pytest.raises(FlashReadError, match="the file ends after"):
            batch.wait()
