"""The self test's Metal cases: right kernels pass them, and a kernel made wrong on purpose fails its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashsparse import native
from flashsparse.selftest import cases, on_gpu
from flashsparse.selftest.cases import Case, judge
from metal_kernels import launch

pytestmark = pytest.mark.usefixtures("metal")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[native.Workers]:
    monkeypatch.setattr(cases, "TIMED_S", 0)
    with native.Workers(1) as made:
        yield made


def named(workers: native.Workers, name: str) -> Case:
    return next(case for case in on_gpu.cases(workers) if case.name == name)


def test_right_kernels_pass(workers: native.Workers) -> None:
    outcomes = [judge(case) for case in on_gpu.cases(workers)]
    assert [outcome for outcome in outcomes if not outcome.ok] == []
    assert len(outcomes) >= 19


@pytest.mark.parametrize(
    ("name", "file", "right", "wrong"),
    [
        ("sparse FFN F16", "sparse_ffn_down", "fma(h[t], w[i]", "fma(0.999f * h[t], w[i]"),
        ("sparse FFN Q4", "rows", "scales + d / GROUP", "scales"),
        ("gate BF16", "rows", "words[i] << 16", "words[i] << 17"),
        ("score Q3", "low_bits", "words[BITS * i / 32 + 1] << (32 - bit)", "words[BITS * i / 32 + 1] << (31 - bit)"),
        ("value Q2", "value", "value *= fabs(lifted);", "value *= lifted;"),
        ("candidates", "candidates", "= uint(verdict)", "= uint(verdict) & uint(row % 8 != 3)"),
        ("compact", "compact", "w * 32 + int(bit)", "w * 32 + int(bit & 15)"),
        ("top-k", "rank", "bits | 0x80000000u", "bits | 0x40000000u"),
        ("lookup", "lookup", "+ begin[slot]", "+ begin[0]"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_fails(
    name: str, file: str, right: str, wrong: str, workers: native.Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = launch._text
    assert right in whole(file)
    launch.kernel.cache_clear()
    monkeypatch.setattr(
        launch, "_text", lambda each: whole(each).replace(right, wrong) if each == file else whole(each)
    )
    outcome = judge(named(workers, name))
    launch.kernel.cache_clear()
    assert not outcome.ok
    assert outcome.error is None or outcome.error > outcome.tolerance
