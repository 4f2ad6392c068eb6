"""Whose turn it is: an engine serves one thread at a time, for one step, and no fork of the process that loaded it.

Owns the lock and the words of its refusals; what a step does is the engine's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flashsparse.errors import SessionError


class Turns:
    """The lock is held during a step, never between two."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread that holds it

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold the engine for one step of this thread. Raises SessionError when it is in use, or forked."""
        if os.getpid() != self._pid:
            raise SessionError("the engine was loaded before a fork, and threads stay behind: load the pack again")
        if not self._lock.acquire(blocking=False):
            raise self._in_use()
        try:
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner = None
            self._lock.release()

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Hold the engine, after the step that another thread is in. Raises SessionError inside a step of this one."""
        if self._owner == threading.get_ident():
            raise self._in_use()
        with self._lock:
            yield

    def _in_use(self) -> SessionError:
        if self._owner == threading.get_ident():
            return SessionError("the engine is in the middle of a step of this thread; wait for its result")
        return SessionError("the engine is in use by another thread; one thread at a time may use it")
