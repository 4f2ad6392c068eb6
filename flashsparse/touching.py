"""Slots' memory, taken from the system before it is needed, by a thread that runs when nothing else wants to.

The first write to a page costs what the system needs to provide it: a page of zeros, and in a virtual machine often a
page fetched from the host, at a fraction of a drive's rate. Loading and a prompt, which wait for the drive, leave time
for that.
Owns the thread; what slots hold does not change.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashsparse import native

if TYPE_CHECKING:
    import numpy as np

PIECE_BYTES = 2 << 20  # between two looks at whether to stop: a huge page
LAST_IN_LINE = 19  # the least of niceness


class Touching:
    """Touches the pages of `buffers` (uint8 [n] each), in their order, while they are used.

    Only where a thread has a priority of its own (`for_this_system`): elsewhere it would take its turn like any other.
    """

    def __init__(self, buffers: Sequence[np.ndarray]) -> None:
        self._stop, self._done = threading.Event(), _Done()
        # Not a method: a thread that knew this object would keep it, and memory that nobody uses any more.
        arguments = buffers, self._stop, self._done
        self._thread = threading.Thread(target=_touch, args=arguments, name="touching", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until every page is there, or the thread was stopped."""
        self._thread.join()

    def close(self) -> int:
        """Stop, and wait for the thread: one piece more at most. The bytes of the pages touched. Idempotent."""
        self._stop.set()
        self._thread.join()
        return self._done.nbytes

    def __del__(self) -> None:
        if hasattr(self, "_stop"):
            self._stop.set()


@dataclass
class _Done:
    nbytes: int = 0


def for_this_system() -> bool:
    """Linux: threads have priorities, and memory pressure is not announced, which would ask to leave slots empty."""
    return os.uname().sysname == "Linux"


def _touch(buffers: Sequence[np.ndarray], stop: threading.Event, done: _Done) -> None:
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST_IN_LINE)
    except OSError:  # a sandbox; then pages are taken when they are used
        return
    for buffer in buffers:
        for start in range(0, len(buffer), PIECE_BYTES):
            if stop.is_set():
                return
            piece = buffer[start : start + PIECE_BYTES]
            native.touch(piece)
            done.nbytes += -(-len(piece) // mmap.PAGESIZE) * mmap.PAGESIZE
