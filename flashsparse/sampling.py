"""Choosing the next token: the options' ranges, and mlx-lm's samplers kept from harm.

mlx-lm's samplers draw from MLX's random state, which the whole process shares, and an exception inside a compiled one
leaves it unusable. So options are checked first, and every draw starts from a seed of the sampler's own sequence.
"""

from __future__ import annotations

import random
from numbers import Real
from typing import Any

import numpy as np

from flashsparse.arguments import shown, whole
from flashsparse.errors import NumericError, UsageError

GREEDY_BELOW = 1e-6  # dividing logits by less overflows float32
LEAST_TOP_P = 1e-6  # keeps the likeliest token only, as any smaller value would
MAX_SEED = 2**63 - 1


def check_sampling(max_tokens: int, temp: float, top_p: float, top_k: int, seed: int | None) -> None:
    """Raise UsageError for the first option out of its range."""
    whole("max_tokens", max_tokens, 1)
    if not _is_number(temp) or not 0 <= temp < float("inf"):
        raise UsageError(f"temp is {shown(temp)}, expected 0 or more")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise UsageError(f"top_p is {shown(top_p)}, expected more than 0 and at most 1")
    whole("top_k", top_k, 0)
    if seed is not None:
        whole("seed", seed, 0, MAX_SEED)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class Sampler:
    """From logits [1, V] to a token. temp near 0 is greedy and needs no MLX; a top_k of V or more keeps every token."""

    def __init__(self, temp: float, top_p: float, top_k: int, seed: int | None, vocabulary: int) -> None:
        self._choose: Any = None
        if temp < GREEDY_BELOW:
            return
        from mlx_lm.sample_utils import make_sampler

        top_k = int(top_k) if top_k < vocabulary else 0
        self._choose = make_sampler(temp=float(temp), top_p=max(float(top_p), LEAST_TOP_P), top_k=top_k)
        self._seeds = random.Random(None if seed is None else int(seed))

    def __call__(self, logits: np.ndarray) -> int:
        """The token chosen. Raises NumericError when a logit is not finite."""
        if not np.isfinite(logits).all():
            raise NumericError(
                "the model's output is not finite: its numbers overflow (a 16-bit checkpoint may need float32), or the "
                "checkpoint is damaged; check the source, or the pack with flashsparse verify"
            )
        return int(np.argmax(logits[0])) if self._choose is None else self._sample(logits)

    def _sample(self, logits: np.ndarray) -> int:
        import mlx.core as mx

        mx.random.seed(self._seeds.getrandbits(63))
        try:
            scores = mx.array(logits)
            return int(self._choose(scores - mx.logsumexp(scores, axis=-1, keepdims=True)).item())
        except BaseException:  # an interrupt too
            mx.random.seed(self._seeds.getrandbits(63))
            raise
