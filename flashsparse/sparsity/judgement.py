"""What judging a predictor tells of one layer: which neurons it named, which fired, and what each was worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerJudgement:
    """One layer of one step of T tokens; the arrays are the observer's to keep.

    predicted: bool [T, I], computed without judging. active: bool [T, I], those whose activation is not zero (DReLU:
    the gate's half of it). values: float32 [T, I], |h| times the norm of the down column, of every neuron.
    """

    layer: int
    predicted: np.ndarray
    active: np.ndarray
    values: np.ndarray
