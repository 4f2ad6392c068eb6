"""FlashSparse runs language models that are larger than the memory they may use; the weights stay on the SSD.

The public names: `load` gives an Engine, `Engine.session` a Session, and every error derives from FlashSparseError.
Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashsparse.errors import (
    BudgetError,
    CheckpointError,
    ContextLengthError,
    ConvertError,
    DamagedPackError,
    FlashReadError,
    FlashSparseError,
    NativeLibraryError,
    NumericError,
    PackError,
    SessionError,
    SourceUnavailableError,
    UnsupportedModelError,
    UsageError,
)

if TYPE_CHECKING:
    from flashsparse.engine import Engine, load
    from flashsparse.memory import MemoryPlan
    from flashsparse.session import Piece, Session
    from flashsparse.stats import Counters, Stats

__version__ = "0.1.0"

_LAZY = {
    "Engine": "flashsparse.engine",
    "load": "flashsparse.engine",
    "MemoryPlan": "flashsparse.memory",
    "Piece": "flashsparse.session",
    "Session": "flashsparse.session",
    "Counters": "flashsparse.stats",
    "Stats": "flashsparse.stats",
}

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ContextLengthError",
    "ConvertError",
    "Counters",
    "DamagedPackError",
    "Engine",
    "FlashReadError",
    "FlashSparseError",
    "MemoryPlan",
    "NativeLibraryError",
    "NumericError",
    "PackError",
    "Piece",
    "Session",
    "SessionError",
    "SourceUnavailableError",
    "Stats",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'flashsparse' has no attribute {name!r}")
