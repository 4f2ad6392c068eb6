"""selftest: right kernels pass, wrong ones fail it and are named, and it reports whatever happens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from flashsparse import native
from flashsparse.cli import selftest as command
from flashsparse.errors import FlashSparseError
from flashsparse.flash.curve import DEPTHS, SIZES, Curve
from flashsparse.selftest import cases, on_cpu
from flashsparse.selftest.cases import Case, judge

DEMO = {"generation_tps": 12.5, "flash_bytes_per_token": 1000, "read_mode": "direct", "kernels": "native"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rates, and neither a drive nor a model."""
    monkeypatch.setattr(cases, "TIMED_S", 0)
    curve = Curve("drive", ((1e9,) * len(DEPTHS),) * len(SIZES), None, 2e9)
    monkeypatch.setattr(command, "_drive", lambda: curve)
    monkeypatch.setattr(command, "_demo", lambda: DEMO)


def run(*options: str) -> Result:
    return CliRunner().invoke(command.selftest, [*options, "--threads", "1"], standalone_mode=False)


def test_right_kernels_pass() -> None:
    result = run("--json")
    report = json.loads(result.output)
    assert result.return_value == 0 and report["ok"]
    assert [row["name"] for row in report["kernels"] if not row["ok"]] == []
    assert {row["backend"] for row in report["kernels"]} == {"native", "metal"} if report["metal_ran"] else {"native"}
    assert len(report["kernels"]) >= 17 and all(row["error"] <= row["tolerance"] for row in report["kernels"])
    assert report["drive"]["sequential"] == 2e9 and report["demo"] == DEMO
    assert report["machine"]["cores"] >= 1 and "mlx" in report["machine"]["versions"]


def test_the_text_says_what_ran_and_that_metal_did_not() -> None:
    result = run()
    assert "12.5 tokens/s" in result.output and "sparse FFN Q4" in result.output
    assert result.output.rstrip().splitlines()[-1].startswith("passed in")
    if not json.loads(run("--json").output)["metal_ran"]:
        assert "Metal        not run" in result.output


def wrong_linear(right: Callable[..., None]) -> Callable[..., None]:
    def linear(workers: Any, matrix: Any, bias: Any, x: np.ndarray, out: np.ndarray) -> None:
        right(workers, matrix, bias, x, out)
        out[-1, -1] *= np.float32(1 + 1e-4)

    return linear


def skips_records(right: Callable[..., None]) -> Callable[..., None]:
    def down(workers: Any, record: Any, slab: Any, offsets: Any, cols: Any, hidden: Any, y: Any) -> None:
        right(workers, record, slab, offsets[8:], cols[8:], hidden, y)

    return down


def makes_nan(right: Callable[..., None]) -> Callable[..., None]:
    def score(workers: Any, matrix: Any, bias: Any, x: Any, out: np.ndarray) -> None:
        right(workers, matrix, bias, x, out)
        out[0, 0] = np.nan

    return score


@pytest.mark.parametrize(
    ("name", "wrong", "failing"),
    [
        ("linear", wrong_linear, "linear"),
        ("ffn_down", skips_records, "sparse FFN"),
        ("score", makes_nan, "score"),
    ],
)
def test_a_wrong_kernel_fails(name: str, wrong: Any, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, name, wrong(getattr(native, name)))
    result = run("--json")
    report = json.loads(result.output)
    assert result.return_value == 1 and not report["ok"]
    failed = [row["name"] for row in report["kernels"] if not row["ok"]]
    assert failed and all(each.startswith(failing) for each in failed)
    assert "FAILED: " + failed[0] in run().output.splitlines()[-1]


def test_candidates_that_miss_a_neuron_or_name_them_all_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = on_cpu.search

    def misses(workers: Any, copy: Any, x: Any, kind: int, param: float, mask: np.ndarray, ids: Any) -> Any:
        found = right(workers, copy, x, kind, param, mask, ids)
        mask[0, np.flatnonzero(mask[0])[0]] = 0
        return found

    def names_all(workers: Any, copy: Any, x: Any, kind: int, param: float, mask: np.ndarray, ids: Any) -> Any:
        mask[:] = 1
        return len(ids), 0

    for wrong in (misses, names_all):
        monkeypatch.setattr(on_cpu, "search", wrong)
        assert [row["name"] for row in json.loads(run("--json").output)["kernels"] if not row["ok"]] == ["candidates"]


def test_a_kernel_that_raises_is_reported_and_the_others_run() -> None:
    def error() -> float:
        raise RuntimeError("the compiler\nrefused it")

    outcome = judge(Case("broken", "metal", 0, error))
    assert (outcome.ok, outcome.error, outcome.problem) == (False, None, "RuntimeError: the compiler refused it")


def test_a_drive_that_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise FlashSparseError("no room")

    monkeypatch.setattr(command, "_drive", refuse)
    assert "drive        not measured: no room" in run().output and run("--json").return_value == 0
    monkeypatch.setattr(command, "_demo", refuse)
    result = run()
    assert result.return_value == 1 and result.output.rstrip().splitlines()[-1].startswith("FAILED: the demo")


def test_a_rate_is_bytes_over_the_best_time() -> None:
    calls: list[int] = []
    assert cases.rate(lambda: calls.append(1), 1000, 0.001) > 0
    assert len(calls) > 1
