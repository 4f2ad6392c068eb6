"""How large each layer's predictor should be: the one that meets the target at the least cost in memory.

A larger predictor names fewer neurons needlessly, so that fewer are kept in the cache; a layer that is dense anyway is
cheaper kept whole. Measuring the candidates is calibration's part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flashsparse.errors import ConvertError

# Neurons that stay in the cache for one token's worth selected: the union over the window's tokens. Measured unions of
# the last 4 or 5 tokens are 2.2 (a layer 24 % dense) to 3.8 times one token's set; denser layers weigh most.
WORKING_SET = 2.5


@dataclass(frozen=True)
class Candidate:
    """A predictor measured on one layer: `bits` of a copy or `rank` of a low-rank one, its bytes, the density it needs.

    `reached` is what calibration reached of the target (a value recall, say). Neither bits nor rank: the layer whole.
    """

    bits: int | None
    rank: int | None
    predictor_bytes: int
    density: float
    reached: float

    @property
    def every(self) -> bool:
        return self.bits is None and self.rank is None


EVERY = Candidate(None, None, 0, 1.0, 1.0)


def cost(candidate: Candidate, layer_bytes: int, working_set: float = WORKING_SET) -> float:
    """Bytes of memory: the predictor's, and of the layer's FFN what a window of tokens keeps, at most all of it."""
    kept = 1.0 if candidate.every else min(1.0, working_set * candidate.density)
    return candidate.predictor_bytes + kept * layer_bytes


def choose(
    candidates: Iterable[Candidate], layer_bytes: int, goal: float, working_set: float = WORKING_SET, every: bool = True
) -> Candidate:
    """The cheapest candidate that reaches `goal`, or the layer whole (`every`) where that is cheaper or none does.

    Of equal cost the one with the fewest predictor bytes. Raises ConvertError when none does and `every` is False.
    """
    given = list(candidates)
    allowed = [one for one in given if one.reached >= goal * (1 - 1e-6)] + ([EVERY] if every else [])
    if not allowed:
        best = max((one.reached for one in given), default=0.0)
        raise ConvertError(
            f"predictor sizes: found {best:.4f} of the target at most, expected {goal:g}; allow larger ones"
        )
    return min(allowed, key=lambda one: (cost(one, layer_bytes, working_set), one.predictor_bytes))


def copy_bytes(width: int, hidden: int, bits: int, group: int, matrices: int = 1, vectors: int = 0) -> int:
    """Bytes in memory of low-bit copies of matrices [width, hidden] and of float32 vectors [width]: bias, norms."""
    return matrices * width * (hidden * bits // 8 + 4 * (hidden // group)) + 4 * vectors * width


def low_rank_bytes(width: int, hidden: int, rank: int, bias: bool = False) -> int:
    """Bytes of a low-rank predictor in memory: float16 matrices, a float32 bias."""
    return 2 * rank * (width + hidden) + 4 * width * bias
