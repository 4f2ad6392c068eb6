"""Hints: a layer's set named before its own input is known, so that reading can start early.

A hint only prefetches; the same-layer predictor decides what is computed. Three sources of states: this layer's FFN
input for the next layer (`next`), a layer's own residual before its attention (`before`), and the hidden state after an
early layer for all later ones (`plan`), which is joined with the window's sets. Measured on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from converter.predictors.low_rank import LowRank, Moments, reduced_rank_regression
from converter.predictors.thresholds import calibrate
from converter.predictors.train import Settings, train
from flashsparse.errors import UsageError
from flashsparse.sparsity.selection import above_threshold

SOURCES = ("next", "before", "plan")
_BLOCK = 1024  # tokens


@dataclass(frozen=True)
class Hint:
    """A predictor of one target layer's set from the states of `source`, and the threshold on its logits."""

    source: str
    predictor: LowRank
    threshold: float

    def hinted(self, states: np.ndarray) -> np.ndarray:
        """bool [T, I] for states [T, d]."""
        return above_threshold(self.predictor.logits(inputs(self.source, states)), self.threshold)


@dataclass(frozen=True)
class HintCounts:
    """A hint against the same-layer predictor's sets, summed over tokens and neurons."""

    tokens: int
    selected: int
    covered: int  # selected and there in time: hinted or resident
    reads: int  # hinted and not resident
    extra: int  # read and not selected

    @property
    def coverage(self) -> float:
        """Share of the selected neurons there in time; 1 when none is selected."""
        return self.covered / self.selected if self.selected else 1.0

    @property
    def reads_per_token(self) -> float:
        return self.reads / self.tokens if self.tokens else 0.0

    @property
    def extra_per_token(self) -> float:
        """Neurons read in vain per token."""
        return self.extra / self.tokens if self.tokens else 0.0


def inputs(source: str, states: np.ndarray) -> np.ndarray:
    """float32 [T, d] that a hint's predictor takes: FFN inputs as they are, residuals scaled to unit RMS."""
    if source not in SOURCES:
        raise UsageError(f"hints from {source!r}: expected one of {', '.join(SOURCES)}")
    states = np.asarray(states, np.float32)
    if source == "next":
        return states
    rms = np.sqrt(np.mean(np.square(states), axis=1, keepdims=True))
    return np.divide(states, rms, out=np.zeros_like(states), where=rms > 0)


def fit_hint(
    source: str,
    states: np.ndarray,
    gate: np.ndarray,
    selected: np.ndarray,
    rank: int,
    goal: float = 0.9,
    settings: Settings | None = None,
) -> Hint:
    """A hint for one layer from paired tokens: states [T, d], the target layer's pre-activations and set [T, I].

    The predictor is the reduced-rank regression of `gate`; with `settings` it is trained further on `selected`. The
    threshold is the highest that hints `goal` of the selected neurons on these tokens. Raises UsageError for an unknown
    source, rows that do not pair up, or a rank that does not fit.
    """
    if not len(states) == len(gate) == len(selected):
        raise UsageError(f"hint: found {len(states)}, {len(gate)} and {len(selected)} tokens, expected pairs")
    x = inputs(source, states)
    moments = Moments(x.shape[1], gate.shape[1])
    for start in range(0, len(x), _BLOCK):
        moments.add(x[start : start + _BLOCK], np.asarray(gate[start : start + _BLOCK], np.float32))
    predictor = reduced_rank_regression(moments, rank)
    if settings is not None:
        predictor = train(x, selected, rank, start=predictor, settings=settings).predictor
    predictor = predictor.stored()
    found = calibrate(predictor.logits(x), selected.astype(np.float32), selected, "recall", goal)
    assert found.threshold is not None  # the rule is a threshold
    return Hint(source, predictor, found.threshold)


def fit_plan(
    states: np.ndarray,
    targets: Iterable[tuple[int, np.ndarray, np.ndarray]],
    rank: int,
    goal: float = 0.9,
    settings: Settings | None = None,
) -> dict[int, Hint]:
    """One hint per later layer from the hidden state [T, d] after an early one: a whole token's reads at once.

    `targets` yields (layer, gate [T, I], selected [T, I]), one layer in memory at a time.
    """
    return {layer: fit_hint("plan", states, gate, selected, rank, goal, settings) for layer, gate, selected in targets}


def window_sets(selected: np.ndarray, window: int, starts: Iterable[int] = (0,)) -> np.ndarray:
    """bool [T, I]: for each token the union of the sets [T, I] of the `window` tokens before it.

    `starts` are the tokens that begin a sequence: nothing before them is seen.
    """
    union = np.zeros_like(selected)
    edges = sorted({0, *starts, len(selected)})
    for first, last in pairwise(edges):
        for distance in range(1, min(window, last - first - 1) + 1):
            union[first + distance : last] |= selected[first : last - distance]
    return union


def hold_out(tokens: int, share: float = 0.1) -> tuple[slice, slice]:
    """The tokens to fit on and the last `share` (at least one) to measure on: whole stretches, as windows need."""
    if tokens < 2 or not 0 < share < 1:
        raise UsageError(
            f"hold out {share} of {tokens} tokens: expected two tokens or more and a share between 0 and 1"
        )
    kept = min(max(1, round(tokens * (1 - share))), tokens - 1)
    return slice(0, kept), slice(kept, tokens)


def measure_hint(hinted: np.ndarray, selected: np.ndarray, resident: np.ndarray | None = None) -> HintCounts:
    """Counts of bool [T, I] arrays: hinted, selected by the same-layer predictor, resident (the window's sets)."""
    new = hinted if resident is None else hinted & ~resident
    there = hinted if resident is None else hinted | resident
    return HintCounts(
        tokens=len(selected),
        selected=int(np.count_nonzero(selected)),
        covered=int(np.count_nonzero(selected & there)),
        reads=int(np.count_nonzero(new)),
        extra=int(np.count_nonzero(new & ~selected)),
    )
