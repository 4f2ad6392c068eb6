"""The modules that take the place of a model's own: linear layers, embeddings, attention, FFN.

Owns the bridge between MLX arrays, in which mlx-lm's model code speaks, and the kernels' float32 numpy arrays. They are
plain callables: setting one on an MLX module removes the module (and its never-evaluated weights) it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from flashsparse.ffn import StreamedFFN
from flashsparse.kernels import Kernels
from flashsparse.kvcache import KVCache
from flashsparse.rows import EmbeddingRows, located
from flashsparse.weights import ResidentStore, Weight


def as_numpy(x: mx.array) -> np.ndarray:
    """The float32 values of x [1, T, n] as a contiguous numpy array [T, n]; evaluates x."""
    flat = np.array(x.astype(mx.float32), copy=False)
    return np.ascontiguousarray(flat.reshape(-1, flat.shape[-1]))


def _scaled(values: np.ndarray, scale: float) -> np.ndarray:
    """`values` (float32, the caller's own) times `scale`, in place."""
    return values if scale == 1.0 else np.multiply(values, np.float32(scale), out=values)


@dataclass(eq=False)
class Linear:
    """x [1, T, cols] -> [1, T, rows]."""

    kernels: Kernels
    weight: Weight
    bias: np.ndarray | None = None

    def numpy(self, x: np.ndarray) -> np.ndarray:
        out = np.empty((x.shape[0], self.weight.rows), np.float32)
        self.kernels.linear(self.weight, self.bias, x, out)
        return out

    def __call__(self, x: mx.array) -> mx.array:
        return mx.array(self.numpy(as_numpy(x)))[None]


@dataclass(eq=False)
class Embedding:
    """ids [1, T] -> rows [1, T, cols] times `scale`, as float32."""

    kernels: Kernels
    weight: Weight | EmbeddingRows
    scale: float = 1.0

    def __call__(self, ids: mx.array) -> mx.array:
        weight, places = located(self.weight, np.array(ids, copy=False).reshape(-1).astype(np.int32))
        out = np.empty((len(places), weight.cols), np.float32)
        self.kernels.gather(weight, places, out)
        return mx.array(_scaled(out, self.scale))[None]


@dataclass(eq=False)
class Heads:
    """What attention is made of: four products, mlx-lm's rotary embedding, `window` (0: none).

    `scale` multiplies what is added to the residual.
    """

    q: Any
    k: Any
    v: Any
    o: Any
    heads: int
    kv_heads: int
    head_dim: int
    rope: Callable[..., mx.array] | None = None
    window: int = 0
    scale: float = 1.0


class Attention(Heads):
    """Causal self-attention over a KVCache: mlx-lm's rotary embedding, our products.

    Causality and the window are the kernel's, so the mask that mlx-lm's model passes is not needed.
    """

    def __call__(self, x: mx.array, mask: Any = None, cache: KVCache | None = None) -> mx.array:
        assert cache is not None
        rows = as_numpy(x)
        q = self._rotated(self.q.numpy(rows), self.heads, cache.offset)
        k = self._rotated(self.k.numpy(rows), self.kv_heads, cache.offset)
        v = self.v.numpy(rows).reshape(-1, self.kv_heads, self.head_dim)
        cache.append(k, v)
        out = np.empty_like(q)
        kernels: Kernels = self.q.kernels
        kernels.attention(q, cache, self.window, self.head_dim**-0.5, out)
        return mx.array(_scaled(self.o.numpy(out.reshape(rows.shape[0], -1)), self.scale))[None]

    def _rotated(self, x: np.ndarray, heads: int, offset: int) -> np.ndarray:
        """[T, heads * head_dim] -> [T, heads, head_dim], rotated by position."""
        split = x.reshape(-1, heads, self.head_dim)
        if self.rope is None:
            return split
        turned = self.rope(mx.array(split).transpose(1, 0, 2)[None], offset=offset)
        return np.ascontiguousarray(np.array(turned[0].transpose(1, 0, 2), copy=False))


@dataclass(eq=False)
class FFN:
    """The streamed FFN as a module; `scale` multiplies what is added to the residual."""

    streamed: StreamedFFN
    scale: float = 1.0

    def __call__(self, x: mx.array) -> mx.array:
        return mx.array(_scaled(self.streamed(as_numpy(x)), self.scale))[None]


def hint(streamed: StreamedFFN, x: mx.array) -> None:
    """Tell a layer's FFN of the residual stream x [1, T, d] before the layer's attention, in steps of one token."""
    if x.shape[1] == 1 and streamed.wants_hint:
        streamed.hint(as_numpy(x))


@dataclass(eq=False)
class Hinting:
    """A layer's first module, which the residual stream enters: it passes by here."""

    module: Callable[..., mx.array]
    streamed: StreamedFFN

    def __call__(self, x: mx.array, **named: Any) -> mx.array:
        hint(self.streamed, x)
        return self.module(x, **named)


def norm(module: Any, store: ResidentStore, base: str) -> None:
    """Put the stored weight (and bias) of a norm into an MLX norm module, in float32."""
    for part in ("weight", "bias"):
        stored = store.vector(f"{base}.{part}")
        if stored is not None:
            module[part] = mx.array(stored)


class Parts:
    """Makes the modules of a model, for kernels that compute on the host. `rows`: of an embedding on flash."""

    def __init__(self, kernels: Any, rows: EmbeddingRows | None = None) -> None:
        self.kernels, self.rows = kernels, rows

    def linear(self, store: ResidentStore, base: str) -> Any:
        """The linear layer stored under `<base>.weight` and, if present, `<base>.bias`."""
        return self.product(store.weight(base), store.vector(f"{base}.bias"))

    def product(self, weight: Weight, bias: np.ndarray | None = None) -> Any:
        return Linear(self.kernels, weight, bias)

    def embedding(self, weight: Weight | EmbeddingRows, scale: float = 1.0) -> Any:
        return Embedding(self.kernels, weight, scale)

    def attention(self, q: Any, k: Any, v: Any, o: Any, heads: int, kv_heads: int, head_dim: int) -> Any:
        """Without rotation, window and scale, which are the caller's to set."""
        return Attention(q, k, v, o, heads, kv_heads, head_dim)

    def entrance(self, module: Callable[..., mx.array], streamed: StreamedFFN) -> Any:
        """What the residual stream enters a layer by: the norm before its attention, without one the attention."""
        return Hinting(module, streamed)

    def second_norm(self, norm: Callable[[mx.array], mx.array], streamed: StreamedFFN) -> Any:
        """The norm before a layer's FFN."""
        return norm

    def ffn(self, streamed: StreamedFFN, scale: float = 1.0) -> Any:
        return FFN(streamed, scale)

    def decoder(self, inner: Callable[..., mx.array], head: Any, divisor: float = 1.0) -> Any:
        return Decoder(inner, head, divisor)


@dataclass(eq=False)
class Decoder:
    """A whole model as the engine sees it: token ids in, hidden states and logits out, all numpy."""

    inner: Callable[..., mx.array]
    lm_head: Linear
    divisor: float = 1.0  # of the states before the head

    def forward(self, ids: np.ndarray, caches: list[KVCache]) -> np.ndarray:
        """ids int32 [T] -> the last hidden states [T, d], after the final norm; advances the caches."""
        return as_numpy(self.inner(mx.array(ids)[None], caches))

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """hidden [n, d] -> float32 logits [n, V]."""
        states = hidden if self.divisor == 1.0 else hidden / np.float32(self.divisor)
        return self.lm_head.numpy(np.ascontiguousarray(states))
