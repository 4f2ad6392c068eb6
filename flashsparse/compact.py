"""The resident copy of a gate in gate layout compact: what a candidate search reads. The search is the kernels'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.pack.gate_copy import PARTS

if TYPE_CHECKING:
    from flashsparse.weights import ResidentStore


@dataclass(frozen=True)
class CompactGate:
    """The copy of one layer's scoring matrix [rows, cols] as `docs/format.md` lays it out, in place.

    high int8, low uint8, scales bf16 as uint16, errors float32; bias float32 [rows] or None.
    """

    name: str
    cols: int
    high: np.ndarray
    low: np.ndarray
    scales: np.ndarray
    errors: np.ndarray
    bias: np.ndarray | None

    @staticmethod
    def load(store: ResidentStore, base: str, cols: int) -> CompactGate:
        high, low, scales, errors = (store.tensor(f"{base}.{part}") for part in PARTS)
        return CompactGate(base, cols, high, low, scales, errors, store.vector(f"{base}.bias"))


def search_bytes(cols: int) -> int:
    """What a search allocates for each token at most: its integers, and four figures of each group."""
    return 2 * (cols + 512) + 16 * (cols // 64 + 8) + 8
