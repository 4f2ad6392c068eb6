"""What the benchmarks say of the machine: figures, page cache, files of results."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from bench import machine
from bench.machine import OthersCpu, cached_share, mean_deviation, note, purge, record, shown, warm


def test_mean_and_deviation_are_the_samples() -> None:
    assert mean_deviation([2.0, 4.0]) == (3.0, pytest.approx(2**0.5))
    assert mean_deviation([5.0]) == (5.0, 0.0)
    assert shown([2.0, 4.0]) == "3.00 ± 1.41"
    assert shown([2.0]) == "2.00"


def test_a_purge_is_checked_page_by_page(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 20))
    if cached_share([path]) is None:
        pytest.skip("no mincore here")
    assert warm([path]) == 1.0
    left = purge([path])
    if left == 1.0:
        pytest.skip("this filesystem keeps pages that it is told to drop")
    assert left == 0.0


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert cached_share([tmp_path / "empty"]) in (0.0, None)


def test_results_are_one_csv_per_machine(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        path = record("decode", "pack", {"limit": "7GB"}, {"decode_tps": [value, value + 2]}, 0.25, {}, tmp_path)
    lines = path.read_text().splitlines()
    assert path.name == machine.machine_name() + ".csv"
    assert json.loads(lines[0].removeprefix("# "))["cores"] == os.cpu_count()
    rows = list(csv.DictReader(lines[1:]))
    assert [row["mean"] for row in rows] == ["2", "3"]
    assert rows[0]["runs"] == "2" and rows[0]["others_cpu"] == "0.25" and "python -m" in rows[0]["command"]
    assert json.loads(rows[0]["conditions"]) == {"limit": "7GB"}


def test_negatives_go_to_a_log_with_their_reason(tmp_path: Path) -> None:
    note("buffered reads", "slower than direct ones", tmp_path)
    assert (tmp_path / "LOG.md").read_text().endswith("buffered reads: slower than direct ones\n")


def test_other_processes_share_is_not_negative() -> None:
    with OthersCpu() as others:
        sum(range(100_000))
    assert others.share is None or others.share >= 0
