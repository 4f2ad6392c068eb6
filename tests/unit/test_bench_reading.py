"""The benchmarks of reading: shares are those of pairs, and bytes and requests those of the plan."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from bench import io, order
from bench.traces.trace import Trace

RECORDS, LAYERS, TOKENS = 256, 2, 6


def test_the_share_is_the_median_of_pairs() -> None:
    pairs = np.array([[1.0, 0.9], [10.0, 9.8], [2.0, 2.2], [4.0, 4.0], [3.0, 0.3]])  # one pair met something else
    assert io.share(pairs) == pytest.approx({"share": 0.98, "share_low": 0.9, "share_high": 1.0})
    found = io.summary(pairs)
    assert found["share"] == pytest.approx(0.98) and found["bare"] == pytest.approx(4.0)
    assert "98 % (90 to 100)" in io.cells(found)


@pytest.fixture
def trace() -> Trace:
    rng = np.random.default_rng(0)
    sets = [[np.flatnonzero(rng.random(RECORDS) < 0.4) for _ in range(TOKENS)] for _ in range(LAYERS)]
    return Trace({"records": RECORDS, "record_bytes": 700}, np.arange(TOKENS, dtype=np.int32), sets)


def test_orders_are_judged_by_requests_and_bytes(tmp_path: Path, trace: Trace) -> None:
    args = argparse.Namespace(
        file=tmp_path / "scratch", bytes=4_000_000, record=1024, gap=1024, tokens=4, repetitions=2, io_threads=2
    )
    scratch = order._scratch(args, trace)
    try:
        rows = order._measure(args, scratch, order.orders(trace), "sets", order._unions(trace, 0.3))
    finally:
        scratch.file.close()
    by = {(row["order"], row["merged"]): row for row in rows}
    assert len(by) == 8 and all(row["gain"] > 0 for row in rows)
    plain = by["source", False]
    assert plain["requests_per_record"] == 1 and plain["bytes_moved"] == pytest.approx(
        max(1024, scratch.file.sector) / 1024
    )
    for name in ("source", "random", "frequency", "coactivation"):
        merged = by[name, True]
        assert merged["requests_per_record"] < 0.8
        assert merged["bytes_moved"] >= 1
