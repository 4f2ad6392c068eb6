"""How many of each layer's neurons a token needs in tier exact, as measured on a text: what slots are divided by.

Running a pack needs none of this: without it every layer gets as many slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsparse.pack.checks import Node


@dataclass(frozen=True)
class ActivitySpec:
    """`densities`: share of the records of each layer that a token needs, in the mean over `tokens` of `texts`."""

    texts: tuple[str, ...]
    tokens: int
    densities: tuple[float, ...]

    @property
    def density(self) -> float:
        """Of all layers together."""
        return sum(self.densities) / len(self.densities)

    def to_dict(self) -> dict[str, Any]:
        return {"texts": list(self.texts), "tokens": self.tokens, "densities": list(self.densities)}


def read_activity(node: Node, layers: int) -> ActivitySpec:
    """The manifest's object. Raises PackError for fields that do not agree."""
    texts, tokens, densities = node.sha256_set("texts"), node.integer("tokens", 1), node.take("densities")
    if not texts:
        node.fail("texts", [], "at least one text")
    shares = isinstance(densities, list) and all(isinstance(d, float) and 0 <= d <= 1 for d in densities)
    if not shares or len(densities) != layers or not all(map(math.isfinite, densities)):
        node.fail("densities", densities, f"a number in 0.0 to 1.0 for each of {layers} layers")
    return node.finish(ActivitySpec(texts, tokens, tuple(densities)))
