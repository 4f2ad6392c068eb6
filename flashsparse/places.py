"""The user's directories for what FlashSparse keeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/flashsparse, else ~/Library/Caches/flashsparse on macOS, else ~/.cache/flashsparse."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "flashsparse"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "flashsparse"
