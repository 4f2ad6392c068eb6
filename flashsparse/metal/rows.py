"""Rows of an embedding that stays on flash, for a GPU: it reads the table in place, by places instead of token ids.

The host knows a step's ids before MLX does, so bringing their rows takes no read-back. Leaves out the table and its
reads (`flashsparse.rows`); a place is written again by the rule of `refills.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashsparse.metal.refills import Refills

if TYPE_CHECKING:
    import mlx.core as mx

    from flashsparse.kernels.metal import MetalKernels
    from flashsparse.rows import EmbeddingRows


class MetalRows:
    """The table of `rows`, whose buffer is MLX's."""

    def __init__(self, rows: EmbeddingRows, kernels: MetalKernels) -> None:
        kernels.views.add(rows.buffer)
        self._rows, self._refills = rows, Refills(kernels.timeline, rows.capacity)
        rows.writing = self._refills.refilling

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Where the rows `ids` are (int32 [T]); waits for outputs of earlier steps, which are evaluated as a rule.

        Raises FlashReadError when reading fails.
        """
        self._refills.settle()
        return self._rows.places(ids)

    def reading(self, places: np.ndarray, output: mx.array) -> None:
        """`output`, not evaluated yet, depends on the rows at `places`."""
        self._refills.reading(places, output)
