"""What is summed up over tokens: losses and divergences of logits, hits and misses of neuron sets.

Pure arithmetic in float64, a block of rows at a time; running a model is evaluate.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashsparse.likelihood import blocks, log_softmax
from flashsparse.sparsity.selection import Confusion, confusion
from flashsparse.stats import Counters


@dataclass
class TokenMeasures:
    """Sums over predicted tokens. `dense_nats`, `kl` and `agreed` stay 0 without logits to compare with."""

    tokens: int = 0
    compared: int = 0  # tokens with logits to compare with
    nats: float = 0.0
    dense_nats: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def add(self, logits: np.ndarray, targets: Sequence[int], dense: np.ndarray | None = None) -> None:
        """Count logits [t, V] that predict `targets` [t], beside the dense model's [t, V]. Raises NumericError."""
        wanted = np.asarray(targets)
        for rows in blocks(len(wanted), logits.shape[1]):
            likely, chosen = log_softmax(logits[rows]), (np.arange(len(wanted[rows])), wanted[rows])
            self.tokens += len(likely)
            self.nats -= float(likely[chosen].sum())
            if dense is not None:
                self._compare(likely, log_softmax(dense[rows]), chosen)

    def _compare(self, likely: np.ndarray, dense: np.ndarray, chosen: tuple[np.ndarray, np.ndarray]) -> None:
        self.compared += len(dense)
        self.dense_nats -= float(dense[chosen].sum())
        self.kl += float((np.exp(dense) * (dense - likely)).sum())
        self.agreed += int((dense.argmax(-1) == likely.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    def to_dict(self, utf8_bytes: int | None) -> dict[str, Any]:
        """Means per token. `utf8_bytes` is the length of the text that the predicted tokens spell, where known."""
        n = self.compared
        dense = math.exp(self.dense_nats / n) if n else None
        return {
            "tokens": self.tokens,
            "perplexity": self.perplexity,
            "bits_per_byte": self.nats / math.log(2) / utf8_bytes if utf8_bytes else None,
            "dense_perplexity": dense,
            "perplexity_ratio": self.perplexity / dense if dense else None,
            "kl": max(0.0, self.kl / n) if n else None,  # rounding may leave it a hair below 0
            "top1_agreement": self.agreed / n if n else None,
        }


@dataclass
class SetMeasures:
    """What was predicted and what was truly active, in one layer or in all; values are |h| * ||down column||."""

    counts: Confusion = field(default_factory=Confusion)
    kept: float = 0.0
    value: float = 0.0

    def add(self, predicted: np.ndarray, active: np.ndarray, values: np.ndarray) -> None:
        """Count bool [T, I] sets and float32 [T, I] values of some tokens."""
        self.counts += confusion(predicted, active)
        self.kept += float(values.sum(where=predicted, dtype=np.float64))
        self.value += float(values.sum(dtype=np.float64))

    def __add__(self, other: SetMeasures) -> SetMeasures:
        return SetMeasures(self.counts + other.counts, self.kept + other.kept, self.value + other.value)

    def to_dict(self) -> dict[str, float]:
        """Shares, summed over tokens before they are divided (as Deja Vu does)."""
        return {
            "recall": self.counts.recall,
            "precision": self.counts.precision,
            "value_recall": self.kept / self.value if self.value else 1.0,
            "predicted_density": self.counts.density,
            "true_density": self.counts.true_density,
        }


def total(layers: Sequence[SetMeasures]) -> SetMeasures:
    """All layers as one."""
    return sum(layers, SetMeasures())


@dataclass
class GenerationMeasures:
    """Greedy continuations side by side, and the dense model's losses on sampled ones."""

    prompts: int = 0
    tokens: int = 0  # of the longer of each two greedy continuations
    equal: int = 0
    diverged_at: int = 0
    sampled: TokenMeasures = field(default_factory=TokenMeasures)  # the pack's samples
    dense_sampled: TokenMeasures = field(default_factory=TokenMeasures)
    cost: Counters = field(default_factory=Counters)  # of the pack's continuations, prompts included

    def add_greedy(self, found: Sequence[int], dense: Sequence[int]) -> None:
        """Count two continuations of one prompt. They diverge at the first place that differs, or at their end."""
        same = [a == b for a, b in zip(found, dense, strict=False)]
        self.prompts += 1
        self.tokens += max(len(found), len(dense))
        self.equal += sum(same)
        self.diverged_at += same.index(False) if False in same else len(same)

    def to_dict(self) -> dict[str, Any]:
        """Shares and means; perplexities of samples are under the dense model."""
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "equal_share": self.equal / self.tokens,
            "mean_divergence": self.diverged_at / self.prompts,
            "sampled_perplexity": self.sampled.perplexity,
            "dense_sampled_perplexity": self.dense_sampled.perplexity,
        }
