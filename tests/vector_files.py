"""Reading the committed reference vectors and running the engine over them; shared by the parity tests.

The error that every tolerance speaks of is max |a - b| / max |b|, over all logits of a case.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests import numpy_llama

if TYPE_CHECKING:
    from flashsparse import Engine

ROOT = Path(__file__).resolve().parent / "vectors"
NAMES = sorted(path.stem for path in ROOT.glob("*.npz"))
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Vector:
    """One case: its checkpoint directory, how it was made, tokens [128], logits [128, V], greedy continuation."""

    name: str
    folder: Path
    record: dict[str, Any]
    tokens: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray

    @property
    def prompt(self) -> list[int]:
        return [int(t) for t in self.tokens[: self.record["prompt_tokens"]]]

    @property
    def rest(self) -> list[int]:
        return [int(t) for t in self.tokens[self.record["prompt_tokens"] :]]

    @property
    def sparse(self) -> bool:
        """Whether the activation has exact zeros."""
        return self.record["activation"] != "silu"

    def oracle(self, **options: Any) -> np.ndarray:
        """The float64 logits of the numpy forward pass for this checkpoint."""
        config, weights = numpy_llama.load(self.folder)
        return numpy_llama.logits(
            config, weights, self.tokens, self.record["activation"], self.record["param"], **options
        )

    def largest_set(self) -> int:
        """The most neurons that one token activates in one layer."""
        active: list[np.ndarray] = []
        self.oracle(active=active)
        return max(int(layer.sum(axis=1).max()) for layer in active)


def read(name: str, root: Path = ROOT) -> Vector:
    record = json.loads((root / f"{name}.json").read_text())
    with np.load(root / f"{name}.npz") as arrays:
        return Vector(name, root / name, record, arrays["tokens"], arrays["logits"], arrays["greedy"])


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """max |a - b| / max |b|."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def engine_logits(engine: Engine, vector: Vector) -> np.ndarray:
    """Logits [128, V]: the prompt prefilled at once, then one token per step."""
    with engine.session() as session:
        rows = [session.logits(vector.prompt), *(session.logits([token]) for token in vector.rest)]
    return np.concatenate(rows)


def engine_greedy(engine: Engine, vector: Vector) -> list[int]:
    """The engine's greedy continuation of the prompt, as long as the recorded one."""
    with engine.session() as session:
        return [piece.token for piece in session.generate(vector.prompt, max_tokens=len(vector.greedy), temp=0.0)]
