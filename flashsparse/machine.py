"""What this machine measures: the curve of the drive under a folder, and the rate at which memory is read.

Owns where curves are kept and when they are measured; how is `flashsparse.flash.curve`'s, what follows for a model
`flashsparse.outlook`'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashsparse import native
from flashsparse.flash.curve import DEPTHS, SIZES, Curve, load_curve, measure, save_curve
from flashsparse.places import cache_dir

__all__ = ["DEPTHS", "SIZES", "Curve", "find_curve", "memory_rate"]

MEMORY_BYTES = 256 << 20


def find_curve(folder: Path, again: bool, tell: Callable[[str], object]) -> tuple[Curve, bool]:
    """The curve of the drive under `folder`, and whether it was known; measured otherwise, and kept.

    `tell` is called with one line when it could not be kept.
    """
    found = None if again else load_curve(cache_dir(), folder)
    if found is not None:
        return found, True
    curve = measure(folder, sorted(folder.glob("flash-*.safetensors")))
    try:
        save_curve(curve, cache_dir(), folder)
    except OSError as error:
        tell(f"the curve could not be kept: {error}")
    return curve, False


def memory_rate(threads: int | None) -> float:
    """Bytes per second that reading memory in order reaches, the best of a few passes."""
    buffer = np.ones(MEMORY_BYTES // 8, np.uint64)
    best = 0.0
    with native.Workers(threads or os.cpu_count() or 1) as workers:
        for _ in range(6):
            began = time.perf_counter()
            native.memory_read(workers, buffer)
            best = max(best, buffer.nbytes / (time.perf_counter() - began))
    return best
