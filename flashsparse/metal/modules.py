"""A model's modules on the GPU: linear layers, embeddings, attention, FFN. Arrays are MLX's from the ids to the logits.

The counterparts of `flashsparse.models.modules`, with its interface. Hidden states are float32; what computes in 16
bits is said in `flashsparse.kernels.metal`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from flashsparse.kernels.metal import attention_dtype, vector
from flashsparse.models.modules import Parts

if TYPE_CHECKING:
    from flashsparse.ffn import StreamedFFN
    from flashsparse.kernels.metal import Matrix, MetalKernels
    from flashsparse.kvcache import KVCache
    from flashsparse.metal.kvcache import MetalKVCache
    from flashsparse.weights import Weight


@dataclass(eq=False)
class Linear:
    """x [..., cols] -> [..., rows]."""

    kernels: MetalKernels
    matrix: Matrix
    bias: mx.array | None

    def __call__(self, x: mx.array) -> mx.array:
        return self.kernels.linear(self.matrix, self.bias, x)


@dataclass(eq=False)
class Embedding:
    """ids [1, T] -> rows [1, T, cols] times `scale`, as float32."""

    kernels: MetalKernels
    matrix: Matrix
    scale: float

    def __call__(self, ids: mx.array) -> mx.array:
        rows = self.kernels.rows(self.matrix, ids)
        return rows if self.scale == 1.0 else rows * self.scale


@dataclass(eq=False)
class Attention:
    """Causal self-attention over a MetalKVCache, by MLX's kernels. Fields as in `flashsparse.models.modules`."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int
    rope: Callable[..., mx.array] | None = None
    window: int = 0
    scale: float = 1.0

    def __call__(self, x: mx.array, mask: Any = None, cache: MetalKVCache | None = None) -> mx.array:
        assert cache is not None
        start, count = cache.offset, x.shape[1]
        q, k = self._rotated(self.q(x), self.heads, start), self._rotated(self.k(x), self.kv_heads, start)
        keys, values = cache.extend(k, self._split(self.v(x), self.kv_heads))
        if self.window and count == 1:
            keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
        dtype = attention_dtype(cache.dtype)
        made = mx.fast.scaled_dot_product_attention(
            q.astype(dtype),
            keys.astype(dtype),
            values.astype(dtype),
            scale=self.head_dim**-0.5,
            mask=self._mask(start, count),
        )
        out = self.o(made.transpose(0, 2, 1, 3).reshape(1, count, -1))
        return out if self.scale == 1.0 else out * self.scale

    def _split(self, x: mx.array, heads: int) -> mx.array:
        """[1, T, heads * head_dim] -> [1, heads, T, head_dim]."""
        return x.reshape(1, -1, heads, self.head_dim).transpose(0, 2, 1, 3)

    def _rotated(self, x: mx.array, heads: int, offset: int) -> mx.array:
        split = self._split(x, heads)
        return split if self.rope is None else self.rope(split, offset=offset)

    def _mask(self, start: int, count: int) -> mx.array | str | None:
        if count == 1:
            return None
        if not self.window:
            return "causal"
        at, seen = mx.arange(start, start + count)[:, None], mx.arange(start + count)[None]
        return (seen <= at) & (at - seen < self.window)


@dataclass(eq=False)
class FFN:
    """The streamed FFN as a module; `scale` multiplies what is added to the residual."""

    streamed: Any
    scale: float

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.streamed(x[0])[None]
        return y if self.scale == 1.0 else y * self.scale


@dataclass(eq=False)
class Decoder:
    """Implements flashsparse.models.decoder.Decoder; hidden states are MLX arrays."""

    kernels: MetalKernels
    inner: Callable[..., mx.array]
    head: Linear
    divisor: float

    def forward(self, ids: np.ndarray, caches: list[KVCache]) -> Any:
        """As in Decoder. Those of one token are late: `logits` waits for them."""
        hidden = self.inner(mx.array(ids)[None], caches)[0]
        if len(ids) > 1:
            self.kernels.timeline.finish(hidden)
        return hidden

    def logits(self, hidden: Any) -> np.ndarray:
        """As in Decoder."""
        made = self.head(hidden if self.divisor == 1.0 else hidden / self.divisor)
        self.kernels.timeline.finish(made)
        return np.array(made)


class MetalParts(Parts):
    """Makes the modules of a model on the GPU; `kernels` are MetalKernels."""

    def product(self, weight: Weight, bias: np.ndarray | None = None) -> Linear:
        return Linear(self.kernels, self.kernels.product(weight), vector(bias))

    def embedding(self, weight: Weight, scale: float = 1.0) -> Embedding:
        return Embedding(self.kernels, self.kernels.stored(weight), scale)

    def attention(self, q: Any, k: Any, v: Any, o: Any, heads: int, kv_heads: int, head_dim: int) -> Attention:
        return Attention(q, k, v, o, heads, kv_heads, head_dim)

    def ffn(self, streamed: StreamedFFN, scale: float = 1.0) -> FFN:
        return FFN(streamed, scale)

    def decoder(self, inner: Callable[..., mx.array], head: Any, divisor: float = 1.0) -> Decoder:
        return Decoder(self.kernels, inner, head, divisor)
