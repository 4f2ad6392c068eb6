"""Decoders that run whole layers in native code, without MLX: Llama and its kin, and OPT.

In a step of one token neighbouring layers are one native call where they can be (`native_step.py`). Else a layer is one
call for everything before the FFN, then the streamed FFN, then the residual. Owns the buffers that the layers share;
leaves out records (`ffn.py`) and what a configuration's fields mean (`models/config.py`).
Results do not depend on how tokens are divided into calls: every native function promises that of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashsparse import native
from flashsparse.loading import FIRST
from flashsparse.models.native_step import native_step
from flashsparse.models.rotation import frequencies
from flashsparse.native.layers import Addresses, Heads, Layer, Norm, turns
from flashsparse.native.steps import Shared
from flashsparse.rows import located

if TYPE_CHECKING:
    from flashsparse.ffn import StreamedFFN
    from flashsparse.kernels.cpu import NativeKernels
    from flashsparse.kvcache import KVCache
    from flashsparse.loading import Loading
    from flashsparse.pack.manifest import Manifest
    from flashsparse.rows import EmbeddingRows
    from flashsparse.stats import Counters
    from flashsparse.weights import ResidentStore, Weight

LAYER_NORM_EPS = 1e-5  # OPT's, which its configuration does not name
POSITION_OFFSET = 2  # rows 0 and 1 of OPT's position table are padding


@dataclass
class Parts:
    """What the families differ in. `positions`: OPT's table; `project_in` and `project_out` of OPT-350m.

    `closing`: the norm after each FFN's residual (post-norm layers). `residual` multiplies what an FFN adds.
    """

    embedding: Weight | EmbeddingRows
    head: Weight
    layers: list[Layer]
    final: Norm | None
    frequencies: np.ndarray | None = None
    factor: float = 1.0
    positions: Weight | None = None
    project_in: Weight | None = None
    project_out: Weight | None = None
    closing: Sequence[Norm] = ()
    embedding_scale: float = 1.0
    residual: float = 1.0
    divisor: float = 1.0


class NativeDecoder:
    """Implements flashsparse.models.decoder.Decoder for calls of at most `chunk` tokens.

    The first of them waits, layer by layer, for the weights that `loading` brings.
    """

    def __init__(
        self,
        parts: Parts,
        loading: Loading,
        kernels: NativeKernels,
        ffns: list[StreamedFFN],
        counters: Counters,
        chunk: int,
        size: int,
    ) -> None:
        self._loading = loading
        self._parts, self._kernels, self._ffns, self._counters, self._chunk = parts, kernels, ffns, counters, chunk
        scratch = max(layer.scratch_floats for layer in parts.layers)
        self._h, self._x = np.empty((chunk, size), np.float32), np.empty((chunk, size), np.float32)
        buffer = np.empty(chunk * scratch, np.float32)
        self._buffers = Addresses(self._h, self._x, buffer)
        turning = 0 if parts.frequencies is None else len(parts.frequencies)
        self._turns = np.empty((chunk, 2, turning), np.float32)
        lent, closing = ffns[0].scratch, bool(parts.closing)
        shared = Shared(
            self._h[0], self._x[0], lent.out[0], buffer, lent.hidden, parts.residual, closing, ffns[0].predicts
        )
        self._step = native_step(kernels, parts.layers, ffns, parts.closing, shared, counters)

    def forward(self, ids: np.ndarray, caches: list[KVCache]) -> np.ndarray:
        """As in Decoder. Raises ValueError for more than `chunk` tokens."""
        tokens, offset, parts = len(ids), caches[0].offset, self._parts
        if tokens > self._chunk:
            raise ValueError(f"{tokens} tokens at once, expected at most {self._chunk}")
        caches[0].check_room(tokens)
        if tokens == 1:  # whose layers are one call, and name records for each other
            self._arrive()
        h, turned = self._embed(ids, offset), None
        if parts.frequencies is not None:
            turns(parts.frequencies, parts.factor, offset, tokens, self._turns[:tokens])
            turned = self._turns.ctypes.data
        at, step = 0, self._step if tokens == 1 else None
        while at < len(parts.layers):
            reached = at if step is None else step.reach(at)
            if step is None or reached == at:
                reached = at + 1
                self._layer(at, h, caches[at], turned)
            else:
                step.run(at, reached, h, caches, turned)
            at = reached
        return self._finish(h)

    def _layer(self, index: int, h: np.ndarray, cache: KVCache, turned: int | None) -> None:
        """One layer, with all that its FFN may need between native calls."""
        tokens, offset, ffn, parts = len(h), cache.offset, self._ffns[index], self._parts
        self._arrive(FIRST + 1 + index)
        if tokens == 1 and ffn.wants_hint:
            ffn.hint(h)
        began = time.perf_counter()
        parts.layers[index].attend(*cache.addresses, cache.capacity, offset, turned, tokens, self._buffers)
        cache.offset = offset + tokens
        self._counters.attention_s += time.perf_counter() - began
        ffn.stream = h if tokens == 1 else None
        self._add(h, ffn(h if parts.closing else self._x[:tokens]), index)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """As in Decoder."""
        self._arrive()
        began = time.perf_counter()
        divisor = self._parts.divisor
        states = hidden if divisor == 1.0 else hidden / np.float32(divisor)
        out = self._linear(self._parts.head, states)
        self._counters.head_s += time.perf_counter() - began
        return out

    def _embed(self, ids: np.ndarray, offset: int) -> np.ndarray:
        """The states h [T, d] that enter the first layer, in the shared buffer."""
        parts, h = self._parts, self._h[: len(ids)]
        embedding, places = located(parts.embedding, ids)
        if parts.project_in is None:
            self._kernels.gather(embedding, places, h)
        else:
            narrow = np.empty((len(ids), embedding.cols), np.float32)
            self._kernels.gather(embedding, places, narrow)
            self._kernels.linear(parts.project_in, None, narrow, h)
        if parts.embedding_scale != 1.0:
            h *= np.float32(parts.embedding_scale)
        if parts.positions is not None:
            rows = np.arange(offset, offset + len(ids), dtype=np.int32) + np.int32(POSITION_OFFSET)
            added = self._x[: len(ids)]
            self._kernels.gather(parts.positions, rows, added)
            h += added
        return h

    def _add(self, h: np.ndarray, y: np.ndarray, index: int) -> None:
        """Add an FFN's output y, which is overwritten, to the residual stream."""
        parts = self._parts
        if parts.residual != 1.0:
            y *= np.float32(parts.residual)
        h += y
        if parts.closing:
            parts.closing[index](self._kernels.workers, h, h)

    def _finish(self, h: np.ndarray) -> np.ndarray:
        parts = self._parts
        if parts.final is not None:
            out = self._x[: len(h)]
            parts.final(self._kernels.workers, h, out)
            h = out
        if parts.project_out is None:
            return h
        self._arrive()
        return self._linear(parts.project_out, h)

    def _arrive(self, stage: int | None = None) -> None:
        """Wait for the weights of that stage (None: all)."""
        if not self._loading.over:
            began = time.perf_counter()
            self._loading.wait(stage)
            self._counters.io_wait_s += time.perf_counter() - began

    def _linear(self, weight: Weight, x: np.ndarray) -> np.ndarray:
        out = np.empty((len(x), weight.rows), np.float32)
        self._kernels.linear(weight, None, np.ascontiguousarray(x), out)
        return out


def build(
    manifest: Manifest,
    store: ResidentStore,
    loading: Loading,
    kernels: NativeKernels,
    ffns: list[StreamedFFN],
    counters: Counters,
    chunk: int,
    rows: EmbeddingRows | None = None,
) -> NativeDecoder:
    """The model of a pack from its resident tensors, for `chunk` tokens at once. FIRST of them must be there.

    `rows`: of an embedding that is not among them.
    """
    parts = (_opt if manifest.family == "opt" else _llama)(manifest, store, kernels, rows)
    return NativeDecoder(parts, loading, kernels, ffns, counters, chunk, manifest.hidden_size)


Product = tuple[native.Matrix, np.ndarray | None]


def _products(kernels: NativeKernels, store: ResidentStore, base: str, names: Sequence[str]) -> list[Product]:
    return [
        (kernels.matrix(store.weight(f"{base}.{name}_proj")), store.vector(f"{base}.{name}_proj.bias"))
        for name in names
    ]


def _heads(m: Manifest) -> Heads:
    return Heads(m.heads, m.kv_heads, m.head_dim, m.source_dtype)


def _norm(store: ResidentStore, base: str, eps: float, centred: bool = False) -> Norm:
    weight = store.vector(f"{base}.weight")
    assert weight is not None  # the resident file was checked when it was opened
    return Norm(weight, store.vector(f"{base}.bias"), eps, centred)


def _llama(manifest: Manifest, store: ResidentStore, kernels: NativeKernels, rows: EmbeddingRows | None) -> Parts:
    config, eps, heads = manifest.config, manifest.config["rms_norm_eps"], _heads(manifest)
    residual = config.get("residual_multiplier", 1.0)
    layers = []
    for index, kind in enumerate(config["layer_types"]):
        base = f"model.layers.{index}"
        layers.append(
            Layer(
                kernels.workers,
                _products(kernels, store, f"{base}.self_attn", "qkvo"),
                _norm(store, f"{base}.input_layernorm", eps),
                _norm(store, f"{base}.post_attention_layernorm", eps),
                heads,
                window=config["sliding_window"] if kind == "sliding_attention" else 0,
                residual=residual,
            )
        )
    turning, factor = frequencies(config)
    return Parts(
        rows or store.weight("model.embed_tokens"),
        store.weight("model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"),
        layers,
        _norm(store, "model.norm", eps),
        turning,
        factor,
        embedding_scale=config.get("embedding_multiplier", 1.0),
        residual=residual,
        divisor=config.get("logits_divisor", 1.0),
    )


def _opt(manifest: Manifest, store: ResidentStore, kernels: NativeKernels, rows: EmbeddingRows | None) -> Parts:
    config, root, eps, heads = manifest.config, "model.decoder", LAYER_NORM_EPS, _heads(manifest)
    first = config["do_layer_norm_before"]
    layers, closing = [], []
    for index in range(manifest.layers):
        base = f"{root}.layers.{index}"
        early = _norm(store, f"{base}.self_attn_layer_norm", eps, centred=True)
        late = _norm(store, f"{base}.final_layer_norm", eps, centred=True)
        layers.append(
            Layer(
                kernels.workers,
                _products(kernels, store, f"{base}.self_attn", ("q", "k", "v", "out")),
                early if first else None,
                late if first else early,
                heads,
                post_norm=not first,
            )
        )
        closing.append(late)
    has_norm = first and not config["_remove_final_layer_norm"]
    projected = config["word_embed_proj_dim"] != manifest.hidden_size
    return Parts(
        rows or store.weight(f"{root}.embed_tokens"),
        store.weight(f"{root}.embed_tokens" if config["tie_word_embeddings"] else "lm_head"),
        layers,
        _norm(store, f"{root}.final_layer_norm", eps, centred=True) if has_norm else None,
        positions=store.weight(f"{root}.embed_positions"),
        project_in=store.weight(f"{root}.project_in") if projected else None,
        project_out=store.weight(f"{root}.project_out") if projected else None,
        closing=() if first else closing,
    )
