"""From a pack that is open and planned to what computes: kernels, layers, KV caches and the decoder over them.

Owns which classes serve which kernels, and imports only those. Loading, and what conversations share, is the engine's.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsparse.assembly import Assembly
    from flashsparse.ffn import StreamedFFN
    from flashsparse.flash import ReadPool
    from flashsparse.kernels import Kernels
    from flashsparse.kvcache import KVCache
    from flashsparse.memory import MemoryPlan
    from flashsparse.models.decoder import Decoder
    from flashsparse.opening import OpenPack
    from flashsparse.pack.manifest import Manifest
    from flashsparse.prefetch import Switch
    from flashsparse.rows import EmbeddingRows
    from flashsparse.sizes import Passes, Sizes
    from flashsparse.stats import Counters
    from flashsparse.weights import Buffer


@dataclass(frozen=True)
class Building:
    """What an engine's parts are made of. `kernels`: the kind; `slabs`: memory of slots that is there already."""

    pack: OpenPack
    sizes: Sizes
    plan: MemoryPlan
    passes: Passes
    pool: ReadPool
    made: Kernels
    kernels: str
    switch: Switch
    counters: Counters
    slabs: list[Buffer | None]

    def ffns(self) -> list[StreamedFFN]:
        """Of all layers."""
        store, *predictors = self.pack.stores
        predictor = predictors[0] if predictors else None
        assembly = self._assembly()(
            self.pack, self.sizes.tier, self.plan, self.pool, self.made, store, predictor, self.switch
        )
        assembly.slabs = self.slabs
        return assembly.layers(self.sizes, self.passes, self.counters)

    def caches(self) -> list[KVCache]:
        """Keys and values of all layers."""
        m = self.pack.manifest
        shape = m.kv_heads, m.head_dim, self.plan.max_kv_size, m.source_dtype
        if self.kernels == "metal":
            from flashsparse.metal.kvcache import MetalKVCache

            return [MetalKVCache(*shape) for _ in range(m.layers)]
        from flashsparse.kvcache import KVCache

        return [KVCache(*shape) for _ in range(m.layers)]

    def decoder(self, ffns: list[StreamedFFN], modules: bool) -> Decoder:
        """Whole layers in native code, or with `modules` mlx-lm's model with our parts in it."""
        if modules:
            return self._modules(ffns)
        from flashsparse.kernels.cpu import NativeKernels
        from flashsparse.models.native_decoder import build

        assert isinstance(self.made, NativeKernels)
        assert self.pack.loading is not None
        m, store, loading = self.pack.manifest, self.pack.stores[0], self.pack.loading
        return build(m, store, loading, self.made, ffns, self.counters, self.passes.chunk, self._rows())

    def _assembly(self) -> type[Assembly]:
        if self.kernels == "metal":
            from flashsparse.metal.assembly import MetalAssembly

            return MetalAssembly
        from flashsparse.assembly import Assembly

        return Assembly

    def _rows(self) -> EmbeddingRows | None:
        """What brings rows of an embedding that stays on flash."""
        if not self.plan.on_flash:
            return None
        from flashsparse.rows import EmbeddingRows

        chunk = self.pack.manifest.prefill_chunk
        return EmbeddingRows(self.pack, self.pool, self.counters, chunk, self.kernels == "metal")

    def _modules(self, ffns: list[StreamedFFN]) -> Decoder:
        import mlx.core as mx

        from flashsparse.models.modules import Parts

        m = self.pack.manifest
        # Freed buffers that MLX keeps for reuse count against the budget: allow one layer's activations.
        mx.set_cache_limit(4 * self.plan.chunk * m.hidden_size * 4)
        family = importlib.import_module(f"flashsparse.models.{m.family}")
        parts_type = Parts
        if self.kernels == "metal":
            from flashsparse.metal.modules import MetalParts as parts_type
        decoder: Decoder = family.build(m.config, self.pack.stores[0], parts_type(self.made, self._rows()), ffns)
        return decoder


def make_kernels(kernels: str, manifest: Manifest, threads: int, counters: Counters) -> Any:
    """Of the kind `kernels` for a pack."""
    if kernels == "metal":
        from flashsparse.kernels.metal import MetalKernels

        return MetalKernels(manifest, counters)
    from flashsparse import kernels as host

    return host.make_kernels(kernels, manifest, threads)


def end_tokens(tokenizer: Any, manifest: Manifest) -> set[int]:
    """Tokens that end a reply: the tokenizer's, or the configuration's without one."""
    if tokenizer is not None:
        return set(tokenizer.eos_token_ids)
    stated = manifest.config.get("eos_token_id")
    return set(stated) if isinstance(stated, list) else set() if stated is None else {stated}
