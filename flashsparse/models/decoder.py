"""What the engine sees of a model: token ids in, hidden states and logits out, all numpy. Imports no MLX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from flashsparse.kvcache import KVCache

CHOICES = ("auto", "native", "modules")


class Decoder(Protocol):
    """A whole model."""

    def forward(self, ids: np.ndarray, caches: list[KVCache]) -> np.ndarray:
        """ids int32 [T] -> hidden states [T, d] after the final norm, valid until the next call; advances the caches.

        Raises ContextLengthError when the tokens do not fit.
        """

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """hidden [n, d] -> float32 logits [n, V]."""
