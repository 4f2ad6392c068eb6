"""A random layer to fit predictors of."""

from __future__ import annotations

import numpy as np

from converter.predictors.low_rank import Moments

D, WIDTH, TOKENS = 64, 96, 600


class Layer:
    """Inputs with very unequal directions, a random gate with a bias, an up and a down projection."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        mix = rng.standard_normal((D, D)) * np.geomspace(3, 0.05, D)
        self.x = (rng.standard_normal((TOKENS, D)) @ mix.T / 4).astype(np.float32)
        self.gate, self.up = rng.standard_normal((2, WIDTH, D)).astype(np.float32)
        self.bias = (rng.standard_normal(WIDTH) - 6).astype(np.float32)
        self.down = rng.standard_normal((D, WIDTH)).astype(np.float32)

    def moments(self) -> Moments:
        found = Moments(D)
        for start in range(0, TOKENS, 128):
            found.add(self.x[start : start + 128])
        return found


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)
