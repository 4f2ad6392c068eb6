"""Where a step's time goes: seconds inside each function of the native library, measured at its Python boundary.

Functions that read, wait and compute in one call are shown whole; what of a step is which, the engine's counters tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class NativeTime:
    """Seconds and calls of each native function since the last `clear`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def per(self, tokens: int) -> dict[str, float]:
        """Milliseconds per token by function, the longest first."""
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {name: round(1e3 * seconds / tokens, 3) for name, seconds in ordered}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.calls[name] = self.calls.get(name, 0) + 1


@contextmanager
def native_time() -> Iterator[NativeTime]:
    """Time every function of the library, for whoever asks it for one within the block; 0.3 microseconds a call.

    Load the pack inside: layers may keep a function that they were given.
    """
    from flashsparse.native.library import lib

    library, found = lib(), NativeTime()
    functions = {name: value for name, value in vars(library).items() if name.startswith("fs_")}
    for name, function in functions.items():
        setattr(library, name, _timed(name, function, found))
    try:
        yield found
    finally:
        for name, function in functions.items():
            setattr(library, name, function)


def _timed(name: str, function: Callable[..., Any], found: NativeTime) -> Callable[..., Any]:
    clock, add = time.perf_counter, found.add

    def call(*args: Any) -> Any:
        began = clock()
        try:
            return function(*args)
        finally:
            add(name, clock() - began)

    return call
