"""What this machine measures: the curve of the drive under a folder, and the rate at which memory is read.

Owns where curves are kept and when they are measured; how is `flashsparse.flash`'s, what follows for a model
`flashsparse.outlook`'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashsparse import native
from flashsparse.flash.curve import DEPTHS, SIZES, Curve, load_curve, save_curve
from flashsparse.flash.probe import measure
from flashsparse.places import cache_dir

__all__ = [
    "DEPTHS",
    "IO_THREADS",
    "SIZES",
    "Curve",
    "curve_notes",
    "find_curve",
    "known_curve",
    "memory_rate",
    "read_mode",
    "read_threads",
]

MEMORY_BYTES = 256 << 20
IO_THREADS = 16  # on a drive whose curve is not known
SMALL_LAYER = 8 << 20


def find_curve(folder: Path, again: bool, tell: Callable[[str], object]) -> tuple[Curve, bool]:
    """The curve of the drive under `folder`, and whether it was known; measured otherwise, and kept.

    `tell` is called with one line when a known one is doubtful and so measured again, and when it could not be kept.
    """
    found = None if again else load_curve(cache_dir(), folder)
    if found is not None and not (doubts := found.doubts()):
        return found, True
    if found is not None:
        tell(f"the known curve is doubtful, so the drive is measured again: {'; '.join(doubts)}")
    curve = measure(folder, sorted(folder.glob("flash-*.safetensors")))
    try:
        save_curve(curve, cache_dir(), folder)
    except OSError as error:
        tell(f"the curve could not be kept: {error}")
    return curve, False


def known_curve(folder: Path) -> Curve | None:
    """The curve that was kept for the drive under `folder`, if any."""
    return load_curve(cache_dir(), folder)


def curve_notes(curve: Curve | None) -> list[str]:
    """What a user should know about the curve that reading follows, a line each."""
    doubts = [] if curve is None else curve.doubts()
    if not doubts:
        return []
    return [f"the drive's curve is doubtful ({'; '.join(doubts)}): `flashsparse doctor --again` measures it anew"]


def read_mode(asked: str, curve: Curve | None) -> str:
    """How to open a pack's files: as `asked`, and for "auto" what the drive's curve found faster."""
    return "buffered" if asked == "auto" and curve is not None and curve.mode == "buffered" else asked


def read_threads(asked: int | None, curve: Curve | None, record_bytes: int, layer_bytes: int) -> int:
    """How many threads read: as many as `asked`, and for None what the drive's curve found enough for records.

    Each has buffers of its own: where a layer is small, they would take the place of slots.
    """
    if asked is not None:
        return asked
    found = IO_THREADS if curve is None else curve.threads(record_bytes)
    return found if layer_bytes >= SMALL_LAYER else min(found, IO_THREADS)


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
