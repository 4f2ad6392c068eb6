"""One kernel's test: its error against a reference, held to a tolerance, and the rate at which it reads.

A kernel that raises has failed, and says why: the first Mac that refuses one shall report all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

TIMED_S = 0.15  # of one kernel; 0: rates are not measured


@dataclass(frozen=True)
class Case:
    """`error` computes with small operands and returns the largest error in units of `tolerance`'s.

    `timed` makes large operands and returns one call over them and the bytes that it reads.
    """

    name: str
    backend: str  # "native" or "metal"
    tolerance: float
    error: Callable[[], float]
    timed: Callable[[], tuple[Callable[[], object], int]] | None = None


@dataclass(frozen=True)
class Outcome:
    """bytes_per_s is None for kernels whose time is not reading, and where the kernel failed before."""

    name: str
    backend: str
    ok: bool
    tolerance: float
    error: float | None
    bytes_per_s: float | None
    problem: str | None = None


def judge(case: Case) -> Outcome:
    """Run one case: its error, then its rate."""
    error = speed = None
    try:
        error = float(case.error())
        if case.timed is not None and TIMED_S > 0:
            speed = rate(*case.timed(), TIMED_S)
    except Exception as problem:
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        return Outcome(case.name, case.backend, False, case.tolerance, error, None, text[:300])
    return Outcome(case.name, case.backend, error <= case.tolerance, case.tolerance, error, speed)


def rate(call: Callable[[], object], moved: int, seconds: float) -> float:
    """Bytes per second of the best of the calls that `seconds` hold, after one that is not counted."""
    call()
    best, until = float("inf"), time.perf_counter() + seconds
    while (began := time.perf_counter()) < until or best == float("inf"):
        call()
        best = min(best, time.perf_counter() - began)
    return moved / best
