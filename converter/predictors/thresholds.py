"""The threshold or k of one layer that meets a target on a sample of tokens, and what it then selects.

Exact on the sample: sorts, no search. The target of a perplexity ratio needs the whole model; `bisect_target` is its
outer loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from flashsparse.errors import ConvertError, NumericError, UsageError
from flashsparse.sparsity.selection import RULES, Confusion, above_threshold, confusion, select

TARGETS = ("value_recall", "recall", "density")
SAMPLE = 2048 * 11008  # (token, neuron) pairs that are looked at
KEPT_BY_CAP = 0.99  # for a density under both rules: the share of the threshold's selections that the cap keeps
_BLOCK = 128  # tokens
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Calibrated:
    """What was chosen, and what it did on all the tokens given. `threshold` is a finite float32."""

    threshold: float | None
    k: int | None
    density: float
    recall: float
    value_recall: float
    precision: float


def calibrate(
    scores: np.ndarray,
    values: np.ndarray,
    active: np.ndarray,
    target: str = "value_recall",
    goal: float = 0.98,
    selection: str = "threshold",
) -> Calibrated:
    """The highest threshold, or the smallest k, with which `target` reaches `goal` (0 < goal <= 1) on the sample.

    scores, values (|h| * ||down column||) float32 and active bool are [T, I]; of more than `SAMPLE` pairs, tokens
    evenly spaced are taken. density: the least selection of at least that share, but not a mass of ties (as at a value
    score of 0) when leaving it out comes closer. topk_and_threshold: the threshold may lose half of what the goal
    allows, and k is the smallest cap with which the goal is still met (density: with which 99 % of the selections
    stay). Where nothing is active (no value, for value_recall) nothing need be selected: the threshold is just above
    every score, k is 1. NaN scores are always selected. Raises UsageError for an unknown target or selection, a goal
    outside (0, 1] and no tokens, NumericError for values that are not finite.
    """
    if target not in TARGETS or selection not in RULES or not 0 < goal <= 1 or not scores.size:
        raise UsageError(
            f"calibration of {selection} to {target} {goal} on {scores.shape[0]} tokens: expected one of "
            f"{', '.join(RULES)}, one of {', '.join(TARGETS)}, a goal over 0 and up to 1, and tokens"
        )
    rows = _sample_rows(*scores.shape)
    sample, gains = scores[rows], _gains(target, values, active, rows)
    total = float(gains.sum(dtype=np.float64))
    if not np.isfinite(total):
        raise NumericError(f"calibration: found values that sum to {total}, expected finite ones")
    threshold = k = None
    if selection != "topk":
        halfway = selection == "topk_and_threshold" and target != "density"
        threshold = _highest_threshold(sample, gains, total, 1 - (1 - goal) / 2 if halfway else goal)
        if target == "density":
            threshold = _without_ties(sample, threshold, goal * sample.size)
    if selection == "topk":
        k = _smallest_k(sample, gains, goal * total if goal < 1 else None, None)
    elif selection == "topk_and_threshold":
        k = _smallest_k(sample, gains, _cap_goal(target, goal, total, sample, threshold), threshold)
    return measure(scores, values, active, selection, threshold, k)


def measure(
    scores: np.ndarray,
    values: np.ndarray,
    active: np.ndarray,
    selection: str,
    threshold: float | None = None,
    k: int | None = None,
) -> Calibrated:
    """What a rule selects from scores [T, I], block by block; `active` may be the needed ones only."""
    counts, kept, total = Confusion(), 0.0, 0.0
    for rows in _blocks(len(scores)):
        predicted = select(scores[rows], selection, threshold, k)
        counts += confusion(predicted, active[rows])
        kept += float(values[rows].sum(where=predicted, dtype=np.float64))
        total += float(values[rows].sum(dtype=np.float64))
    share = kept / total if total else 1.0
    return Calibrated(threshold, k, counts.density, counts.recall, share, counts.precision)


def bisect_target(
    evaluate: Callable[[float], float], limit: float, lo: float, hi: float, tol: float = 1e-3
) -> tuple[float, float]:
    """The least x in [lo, hi], to within `tol`, at which evaluate(x) <= limit, and evaluate(x) there.

    For a perplexity ratio (evaluate) that falls as the value recall (x) rises. What is returned was evaluated and meets
    the limit. Raises ConvertError when `hi` does not.
    """
    best, reached = hi, evaluate(hi)
    if not reached <= limit:  # NaN fails too
        raise ConvertError(
            f"target: found {reached:.6g} at the strictest setting {hi:g}, expected at most {limit:.9g}; "
            "allow more, or take a larger predictor"
        )
    lowest = evaluate(lo)
    if lowest <= limit:
        return lo, lowest
    while best - lo > tol:
        middle = (lo + best) / 2
        found = evaluate(middle)
        if found <= limit:
            best, reached = middle, found
        else:
            lo = middle
    return best, reached


def _sample_rows(tokens: int, width: int) -> np.ndarray | slice:
    limit = max(1, SAMPLE // width)
    return slice(None) if tokens <= limit else np.linspace(0, tokens - 1, limit).astype(np.int64)


def _gains(target: str, values: np.ndarray, active: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
    """What selecting each pair adds to the target's sum, [T, I] of the sample."""
    if target == "value_recall":
        return values[rows]
    return active[rows] if target == "recall" else np.broadcast_to(np.True_, active[rows].shape)


def _highest_threshold(scores: np.ndarray, gains: np.ndarray, total: float, goal: float) -> float:
    """The highest score t such that the pairs with score >= t (and NaN) hold `goal` of the total; ties all count."""
    unordered = np.isnan(scores)
    counted = (gains > 0) & ~unordered
    found, weights = scores[counted], gains[counted]
    missing = goal * total - float(gains.sum(where=unordered, dtype=np.float64))
    if missing <= 0 or not len(found):
        return _above_all(scores)
    if goal == 1:
        return _finite(found.min())
    if weights.dtype == bool:  # equal gains: no need of a full order
        last = len(found) - min(_whole(missing), len(found))
        return _finite(np.partition(found, last)[last])
    order = np.argsort(found)[::-1]
    held = np.cumsum(weights[order], dtype=np.float64)
    return _finite(found[order[min(int(np.searchsorted(held, missing)), len(held) - 1)]])


def _without_ties(scores: np.ndarray, threshold: float, wanted: float) -> float:
    """The next higher score where the ties at the threshold overshoot by more than their absence falls short."""
    above = scores > np.float32(threshold)
    surplus = np.count_nonzero(above_threshold(scores, threshold)) - wanted
    shortfall = wanted - np.count_nonzero(above | np.isnan(scores))
    return _finite(scores[above].min()) if surplus > shortfall + 1 and above.any() else threshold


def _cap_goal(target: str, goal: float, total: float, scores: np.ndarray, threshold: float | None) -> float | None:
    """The sum that the capped selection must keep; None for all of it."""
    if target == "density" and threshold is not None:
        return KEPT_BY_CAP * np.count_nonzero(above_threshold(scores, threshold))
    return goal * total if goal < 1 else None


def _smallest_k(scores: np.ndarray, gains: np.ndarray, wanted: float | None, threshold: float | None) -> int:
    """The smallest k >= 1 such that the tokens' k highest (of those above a threshold) hold `wanted`, or all."""
    by_rank = np.zeros(scores.shape[1])
    for rows in _blocks(len(scores)):
        ranked = np.where(np.isnan(scores[rows]), np.inf, scores[rows])
        order = np.argsort(-ranked, axis=1, kind="stable")
        counted = gains[rows] if threshold is None else gains[rows] * above_threshold(scores[rows], threshold)
        by_rank += np.take_along_axis(counted, order, axis=1).sum(axis=0, dtype=np.float64)
    if wanted is None:
        return 1 + int(np.flatnonzero(by_rank)[-1]) if by_rank.any() else 1
    reached = np.cumsum(by_rank) >= wanted * (1 - 1e-12)  # 0.56 of 7000 is a little above 3920
    return 1 + (int(np.argmax(reached)) if reached.any() else len(by_rank) - 1)


def _whole(count: float) -> int:
    """The least whole number not below `count`, but for rounding."""
    return int(np.ceil(count - 1e-6))


def _above_all(scores: np.ndarray) -> float:
    finite = scores[np.isfinite(scores)]
    return _finite(np.nextafter(finite.max(), np.float32(np.inf))) if len(finite) else _LARGEST


def _finite(threshold: float) -> float:
    return float(np.clip(np.float32(threshold), -_LARGEST, _LARGEST))


def _blocks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, _BLOCK):
        yield slice(start, start + _BLOCK)
