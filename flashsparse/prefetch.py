"""Reading ahead: a layer's reads that start before its own input is known.

A hint starts reads early and decides nothing: which records are computed is the chooser's to say, later, from the
layer's input. So results do not depend on hints.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Lookahead(Protocol):
    """One layer's."""

    @property
    def active(self) -> bool:
        """Whether a hint is worth computing now."""

    def start(self, h: np.ndarray) -> None:
        """Start reading what the residual stream h [1, d] before the layer's attention suggests."""
