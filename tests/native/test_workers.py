"""Where compute threads run: helpers keep off their caller's processor and off one another's; the caller stays free."""

from __future__ import annotations

import itertools
import os
import sys

import numpy as np
import pytest

from flashsparse import native

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system decides alone")


def threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def product(workers: native.Workers, data: np.ndarray) -> np.ndarray:
    matrix = native.Matrix(data.ctypes.data, *data.shape, native.DTYPES["F32"], keep=data)
    out = np.empty((1, len(data)), np.float32)
    native.linear(workers, matrix, None, np.ones((1, data.shape[1]), np.float32), out)
    return out


@pytest.mark.parametrize("count", [2, 3])
def test_a_helper_leaves_its_callers_processor(count: int) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < count:
        pytest.skip(f"{count} threads need {count} processors")
    data = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    before = threads()
    with native.Workers(count) as workers:
        expected, helpers = product(workers, data), threads() - before
        assert len(helpers) == count - 1
        one = min(helpers)
        for processor in itertools.islice(itertools.cycle(sorted(allowed)), 10_000):
            # Wherever the caller is, it meets a helper that is held on that processor sooner or later.
            os.sched_setaffinity(one, {processor})
            for _ in range(3):
                assert np.array_equal(product(workers, data), expected)
            if os.sched_getaffinity(one) != {processor}:
                break
        moved = os.sched_getaffinity(one)
        assert moved and moved < allowed
        assert os.sched_getaffinity(0) == allowed


def test_a_caller_that_may_use_one_processor_only_keeps_its_helpers() -> None:
    allowed, before = os.sched_getaffinity(0), threads()
    data = np.random.default_rng(1).standard_normal((512, 512)).astype(np.float32)
    with native.Workers(2) as workers:
        expected = product(workers, data)
        (helper,) = threads() - before
        try:
            os.sched_setaffinity(0, {min(allowed)})
            os.sched_setaffinity(helper, {min(allowed)})
            for _ in range(50):
                assert np.array_equal(product(workers, data), expected)
            assert os.sched_getaffinity(helper) == {min(allowed)}
        finally:
            os.sched_setaffinity(0, allowed)
