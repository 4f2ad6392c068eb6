"""The errors FlashSparse raises, and how their messages write sizes. One base class for all.

Each error says what, where, found, expected and what to do next. The command line prints `str(error)` on one line and
exits 2 for a UsageError, 1 for every other one.
"""

from __future__ import annotations


class FlashSparseError(Exception):
    """Base of every error that FlashSparse raises on purpose."""


class UsageError(FlashSparseError):
    """The request itself is wrong: an option's value, an empty prompt, a path that is not what it should be."""


class CheckpointError(FlashSparseError):
    """A source checkpoint is malformed, incomplete or unsafe to read."""


class UnsupportedModelError(FlashSparseError):
    """An architecture, activation or configuration field that FlashSparse cannot run correctly."""


class SourceUnavailableError(FlashSparseError):
    """A repository id that cannot be downloaded or found in the local cache."""


class ConvertError(FlashSparseError):
    """A conversion that cannot start or continue: destination exists, other options on resume, disk full."""


class PackError(FlashSparseError):
    """A pack whose format, version or manifest is not what this reader knows."""


class DamagedPackError(PackError):
    """A pack whose bytes do not match its checksums or sizes."""


class BudgetError(FlashSparseError):
    """A memory budget that cannot hold the floor. `smallest` is the smallest budget in bytes that works."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class FlashReadError(FlashSparseError):
    """A read from flash that failed or came up short. Has `path`, `offset`, `length` (bytes) and `errno` (0: short)."""

    def __init__(self, message: str, path: str, offset: int, length: int, errno: int) -> None:
        super().__init__(message)
        self.path, self.offset, self.length, self.errno = path, offset, length, errno


class ContextLengthError(FlashSparseError):
    """A conversation that would exceed the KV cache reserved by --max-kv-size."""


class SessionError(FlashSparseError):
    """A session used in a way it cannot serve: closed, a second one at once, a saved file of another pack."""


class NumericError(FlashSparseError):
    """The model computed numbers that are not finite, from which no token can be chosen."""


class NativeLibraryError(FlashSparseError):
    """The native library is missing or of another version than the Python package."""


class RefillError(FlashSparseError):
    """A slot was about to be overwritten while a computation may still read it: a defect of FlashSparse itself."""


def format_bytes(size: int) -> str:
    """`7.00 GB`, `512 MB`, `12 B`: decimal units, as `--dram` takes them."""
    if abs(size) >= 1_000_000_000:
        return f"{size / 1e9:.2f} GB"
    if abs(size) >= 1_000_000:
        return f"{size / 1e6:.0f} MB" if abs(size) >= 100_000_000 else f"{size / 1e6:.1f} MB"
    return f"{size / 1e3:.1f} kB" if abs(size) >= 1000 else f"{size} B"
