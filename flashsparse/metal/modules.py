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
from flashsparse.metal.rows import MetalRows
from flashsparse.models.modules import Heads, Parts
from flashsparse.rows import EmbeddingRows

if TYPE_CHECKING:
    from flashsparse.ffn import StreamedFFN
    from flashsparse.kernels.metal import Matrix, MetalKernels
    from flashsparse.kvcache import KVCache
    from flashsparse.metal.kvcache import MetalKVCache
    from flashsparse.metal.walk import Walk
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
    """ids [1, T], of a table of rows in use their places, -> rows [1, T, cols] times `scale`, as float32."""

    kernels: MetalKernels
    matrix: Matrix
    scale: float

    def __call__(self, ids: mx.array) -> mx.array:
        rows = self.kernels.rows(self.matrix, ids)
        return rows if self.scale == 1.0 else rows * self.scale


class Attention(Heads):
    """Causal self-attention over a MetalKVCache, by MLX's kernels."""

    def __call__(self, x: mx.array, mask: Any = None, cache: MetalKVCache | None = None) -> mx.array:
        assert cache is not None
        walk: Walk = self.q.kernels.walk
        made = walk.replayed()
        if made is None:
            return walk.keep(self._attend(x, cache))
        cache.offset += x.shape[1]
        return made

    def _attend(self, x: mx.array, cache: MetalKVCache) -> mx.array:
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

    kernels: MetalKernels
    streamed: Any
    scale: float

    def __call__(self, x: mx.array) -> mx.array:
        walk = self.kernels.walk
        made = walk.replayed()
        if made is None:
            made = walk.keep(self.streamed(x[0])[None])
        return made if self.scale == 1.0 else made * self.scale


@dataclass(eq=False)
class Noting:
    """The norm before a layer's FFN; notes the residual stream of a single token, which later layers' hints go by."""

    norm: Callable[[mx.array], mx.array]
    streamed: Any

    def __call__(self, x: mx.array) -> mx.array:
        self.streamed.state = x[0] if x.shape[1] == 1 else None
        return self.norm(x)


@dataclass
class Told:
    """Hidden states [T, d] whose logits [T, V] were read back with them."""

    hidden: mx.array
    logits: np.ndarray

    def __getitem__(self, rows: slice) -> Told:
        return Told(self.hidden[rows], self.logits[rows])


@dataclass(eq=False)
class Decoder:
    """Implements flashsparse.models.decoder.Decoder; hidden states are MLX arrays. `rows`: see MetalRows."""

    kernels: MetalKernels
    inner: Callable[..., mx.array]
    head: Linear
    divisor: float
    rows: MetalRows | None = None

    def forward(self, ids: np.ndarray, caches: list[KVCache]) -> Any:
        """As in Decoder. Those of one token are late: `logits` waits for them; or come with their logits (`Told`)."""
        if len(ids) == 1 and self.kernels.walk.wanted:
            return self._at_once(ids, caches)
        hidden = self._hidden(ids, caches)
        if len(ids) > 1:
            self.kernels.timeline.finish(hidden)
        return hidden

    def _hidden(self, ids: np.ndarray, caches: list[KVCache]) -> mx.array:
        if self.rows is None:
            return self.inner(mx.array(ids)[None], caches)[0]
        places = self.rows.places(ids)
        hidden = self.inner(mx.array(places)[None], caches)[0]
        self.rows.reading(places, hidden)
        return hidden

    def logits(self, hidden: Any) -> np.ndarray:
        """As in Decoder."""
        if isinstance(hidden, Told):
            return hidden.logits
        made = self._head(hidden)
        self.kernels.timeline.finish(made)
        return np.array(made)

    def _head(self, hidden: mx.array) -> mx.array:
        return self.head(hidden if self.divisor == 1.0 else hidden / self.divisor)

    def _at_once(self, ids: np.ndarray, caches: list[KVCache]) -> Told:
        """A token that is planned whole (`flashsparse.metal.walk`). Keys and values of a second pass go where the first
        one's were."""
        kernels, start = self.kernels, caches[0].offset
        with kernels.walk.begun():
            told = self._told(ids, caches)
            if not kernels.walk.verify():
                kernels.counters.resumed += 1
                for cache in caches:
                    cache.offset = start
                told = self._told(ids, caches)
        return told

    def _told(self, ids: np.ndarray, caches: list[KVCache]) -> Told:
        hidden = self._hidden(ids, caches)
        made = self._head(hidden)
        self.kernels.timeline.finish(made)
        return Told(hidden, np.array(made))


class MetalParts(Parts):
    """Makes the modules of a model on the GPU; `kernels` are MetalKernels."""

    def __init__(self, kernels: MetalKernels, rows: EmbeddingRows | None = None) -> None:
        super().__init__(kernels, rows)
        self._located = None if rows is None else MetalRows(rows, kernels)

    def product(self, weight: Weight, bias: np.ndarray | None = None) -> Linear:
        return Linear(self.kernels, self.kernels.product(weight), vector(bias))

    def embedding(self, weight: Weight | EmbeddingRows, scale: float = 1.0) -> Embedding:
        stored = weight.weight if isinstance(weight, EmbeddingRows) else weight
        return Embedding(self.kernels, self.kernels.stored(stored), scale)

    def attention(self, q: Any, k: Any, v: Any, o: Any, heads: int, kv_heads: int, head_dim: int) -> Attention:
        return Attention(q, k, v, o, heads, kv_heads, head_dim)

    def entrance(self, module: Callable[..., mx.array], streamed: StreamedFFN) -> Any:
        return module

    def second_norm(self, norm: Callable[[mx.array], mx.array], streamed: StreamedFFN) -> Any:
        return Noting(norm, streamed)

    def ffn(self, streamed: StreamedFFN, scale: float = 1.0) -> FFN:
        return FFN(self.kernels, streamed, scale)

    def decoder(self, inner: Callable[..., mx.array], head: Any, divisor: float = 1.0) -> Decoder:
        return Decoder(self.kernels, inner, head, divisor, self._located)
