"""What recorded active sets look like (density, persistence, unions, hot share, co-activation), and profiles to keep.

Used by the generator of synthetic checkpoints on what it wrote and by benchmarks on the run that is timed. Knows sets
of neuron numbers only, neither weights nor models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Sets = Sequence[Sequence[npt.NDArray[np.integer]]]  # [layer][token] -> ascending ids of the active neurons

LAGS = (1, 2, 4, 8)
FRIENDS = (1, 4, 8)
TOLERANCE = 0.10


@dataclass(frozen=True)
class Profile:
    """How a planted model's neurons behave, and the figures that follow.

    A neuron is active when its drive, a stationary Gaussian process of variance 1, exceeds its threshold. The drive is
    a slow part (a share `slow` of the variance, correlation `memory` from token to token) plus a fast part that is new
    with every token. Thresholds are normal: a share `hot` of the neurons around `hot_threshold`, the others around
    `cold_threshold`, each with standard deviation `spread`. `unseen` is the share of the drive's variance that lies
    outside the low-rank part of the gate. `asked` are the figures that a run must show within 10 %.
    """

    name: str
    slow: float
    memory: float
    hot: float
    hot_threshold: float
    cold_threshold: float
    spread: float
    unseen: float
    asked: dict[str, float]
    recall: float  # of the low-rank part as a predictor that names as many neurons as are active


# LLM in a flash, OPT-6.7B: density, union_4 and new are the published figures, the others follow from the thresholds.
PAPER = Profile(
    "paper", slow=0.1, memory=0.9, hot=0.3236, hot_threshold=0.5563, cold_threshold=2.6903, spread=0.3, unseen=0.01,
    asked={
        "density": 0.10, "union_4": 0.24, "new": 0.024, "hot_share": 0.418,
        "persistence_1": 0.358, "persistence_2": 0.556, "persistence_4": 0.760, "persistence_8": 0.899,
    },
    recall=0.95,
)  # fmt: skip
# NeuroPrefetcher: persistence_1 is the published figure.
PERSISTENT = Profile(
    "persistent", slow=0.99, memory=0.9587, hot=0.0, hot_threshold=0.0, cold_threshold=1.5644, spread=0.7, unseen=0.01,
    asked={
        "density": 0.10, "union_4": 0.142, "new": 0.0099, "hot_share": 0.372,
        "persistence_1": 0.82, "persistence_2": 0.869, "persistence_4": 0.901, "persistence_8": 0.924,
    },
    recall=0.95,
)  # fmt: skip
PROFILES = {profile.name: profile for profile in (PAPER, PERSISTENT)}


def measure(sets: Sets, records: int, hot: Sequence[npt.ArrayLike] | None = None) -> dict[str, float]:
    """Figures of recorded active sets, averaged over layers; at least 9 tokens, consecutive.

    records: neurons per layer; hot: for each layer the ids of its hottest tenth as planted (else the hottest tenth in
    these very sets, which a short run overstates). Shares of a layer: `density`, `union_4` (of the last 4 tokens),
    `new` (active now, in none of the last 4). Shares of a token's set: `persistence_k` (active in one of the last k
    tokens), `hot_share`. `friend_k`: how often a neuron's k-th closest friend is active with it. Raises ValueError
    when the sets are too few.
    """
    if not sets or any(len(layer) <= max(LAGS) for layer in sets):
        raise ValueError(f"active sets of at least {max(LAGS) + 1} tokens are needed in every layer")
    rows = [_measure_layer(_matrix(layer, records), None if hot is None else hot[n]) for n, layer in enumerate(sets)]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def check_profile(measured: dict[str, float], profile: Profile | str) -> list[str]:
    """One line for each figure more than 10 % off what the profile (or its name) asks; empty when the run counts."""
    profile = PROFILES[profile] if isinstance(profile, str) else profile
    return [
        f"{key} is {measured[key]:.4f}, asked {asked:.4f} ({100 * (measured[key] / asked - 1):+.0f} %)"
        for key, asked in profile.asked.items()
        if not abs(measured[key] / asked - 1) <= TOLERANCE
    ]


def _matrix(layer: Sequence[npt.NDArray[np.integer]], records: int) -> npt.NDArray[np.bool_]:
    active = np.zeros((len(layer), records), np.bool_)
    for token, ids in enumerate(layer):
        active[token, ids] = True
    return active


def _measure_layer(active: npt.NDArray[np.bool_], hot: npt.ArrayLike | None) -> dict[str, float]:
    now = active[max(LAGS) :]
    total = max(1, int(now.sum()))
    recent = {lag: _any_of_last(active, lag) for lag in LAGS}
    counts = active.sum(axis=0)
    hottest = np.argsort(-counts, kind="stable")[: active.shape[1] // 10] if hot is None else np.asarray(hot)
    return {
        "density": float(active.mean()),
        **{f"persistence_{lag}": int((now & recent[lag]).sum()) / total for lag in LAGS},
        "union_4": float((now | _any_of_last(active, 3)).mean()),
        "new": float((now & ~recent[4]).mean()),
        "hot_share": int(counts[hottest].sum()) / max(1, int(counts.sum())),
        **_friends(active, counts),
    }


def _any_of_last(active: npt.NDArray[np.bool_], lag: int) -> npt.NDArray[np.bool_]:
    """[tokens - 8, records]: active in one of the `lag` tokens before."""
    first, end = max(LAGS), len(active)
    return np.logical_or.reduce([active[first - back : end - back] for back in range(1, lag + 1)])


def _friends(active: npt.NDArray[np.bool_], counts: npt.NDArray[np.integer], sample: int = 128) -> dict[str, float]:
    """Mean share of a neuron's activations in which its closest, 4th and 8th closest friend is active too."""
    often = np.flatnonzero(counts >= min(8, counts.max(initial=0)))
    chosen = often[:: max(1, len(often) // sample)][:sample]
    together = active[:, chosen].T.astype(np.float32) @ active.astype(np.float32)  # [sample, records]
    together[np.arange(len(chosen)), chosen] = -1
    best = -np.partition(-together, max(FRIENDS) - 1, axis=1)[:, : max(FRIENDS)]
    best = -np.sort(-best, axis=1) / np.maximum(counts[chosen], 1)[:, None]
    return {f"friend_{k}": float(best[:, k - 1].mean()) for k in FRIENDS}
