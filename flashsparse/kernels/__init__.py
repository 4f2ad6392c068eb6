"""Which implementation computes: `native` (C++ on the CPU), `metal` (Apple GPUs) or `reference` (plain MLX operators).

Owns the choice, and the interface of those that compute on the host: all operands are float32 numpy arrays; weights
stay in their stored type; a row's result does not depend on which other rows are computed with it. Those on the GPU
(`metal.py`) take and give MLX arrays, late; `flashsparse.metal` is what an engine is made of with them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from flashsparse.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from flashsparse.compact import CompactGate
    from flashsparse.kvcache import KVCache
    from flashsparse.pack.manifest import Manifest
    from flashsparse.weights import Weight

CHOICES = ("auto", "native", "metal", "reference")


class Kernels(Protocol):
    """T tokens, d hidden size, I neurons, n records."""

    name: str

    def linear(self, weight: Weight, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
        """out[T, rows] = x[T, cols] · weightᵀ + bias[rows]."""

    def score(self, weight: Weight, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
        """out[T, rows] = x[T, cols] · weightᵀ + bias for 1 to 4 bits, x rounded to int8 per group (max |x| / 127).

        A token that holds NaN or Inf scores NaN everywhere.
        """

    def select(self, scores: np.ndarray, threshold: float, k: int | None, mask: np.ndarray, ids: np.ndarray) -> int:
        """mask[T, I] (uint8) = not scores[T, I] < threshold, with k among a token's k largest (NaN first, then ties by
        number); ids [I] (int32) begins with the ascending union over tokens, whose length is returned."""

    def candidates(self, gate: CompactGate, x: np.ndarray, mask: np.ndarray, ids: np.ndarray) -> int:
        """mask[T, I] (uint8) = 0 only where the activation that `hidden` computes from a record is zero for x [T, d].

        ids [I] (int32) begins with the ascending union over tokens, whose length is returned.
        """

    def gather(self, weight: Weight, ids: np.ndarray, out: np.ndarray) -> None:
        """out[n, cols] = the rows `ids` (int32) of weight."""

    def attention(self, q: np.ndarray, cache: KVCache, window: int, scale: float, out: np.ndarray) -> None:
        """Causal attention of q [T, H, hd], the cache's last T positions, into out [T, H, hd]; window 0 is none."""

    def activate(self, scores: np.ndarray) -> None:
        """Apply the pack's activation to the scores [T, I] in place."""

    def active(self, activated: np.ndarray) -> np.ndarray:
        """Ascending neuron numbers (int32) that are not zero for at least one token."""

    def hidden(
        self,
        slab: np.ndarray,
        offsets: np.ndarray,
        ids: np.ndarray,
        cols: np.ndarray,
        x: np.ndarray,
        activated: np.ndarray | None,
        mask: np.ndarray | None,
        hidden: np.ndarray,
    ) -> None:
        """Intermediate values of the records at byte `offsets` of `slab` into columns `cols` of hidden [T, width].

        Exactly zero where mask [T, I] (uint8, None: all ones) is 0 for the neuron.
        """

    def down(self, slab: np.ndarray, offsets: np.ndarray, cols: np.ndarray, hidden: np.ndarray, y: np.ndarray) -> None:
        """y[T, d] += hidden · down, over the records in the order given; exact zeros are skipped."""

    def close(self) -> None:
        """Stop the compute threads."""


def resolve(choice: str, layers: str = "auto") -> str:
    """The kernels that `choice` stands for: auto is metal where MLX's default device is an Apple GPU, else native.

    layers: "native" asks for native code. Raises UsageError for an unknown name, and for metal where there is none.
    """
    if choice not in CHOICES:
        raise UsageError(f"kernels: {choice!r} is not one of {', '.join(CHOICES)}")
    if choice == "auto":
        return "metal" if layers != "native" and sys.platform == "darwin" and _has_metal() else "native"
    if choice == "metal" and not _has_metal():
        raise UsageError("kernels: 'metal' needs an Apple GPU as MLX's default device; use 'native' or 'auto'")
    return choice


def _has_metal() -> bool:
    from metal_kernels.launch import available  # imports MLX, which takes time

    return available()


def make_kernels(choice: str, manifest: Manifest, threads: int) -> Kernels:
    """Build the host's kernels for a pack: "reference" or "native"."""
    if choice == "reference":
        from flashsparse.kernels.reference import ReferenceKernels

        return ReferenceKernels(manifest)
    from flashsparse.kernels.cpu import NativeKernels

    return NativeKernels(manifest, threads)
