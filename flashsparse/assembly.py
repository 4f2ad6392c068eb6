"""Puts a layer together: its records, its slots, and what decides which neurons it computes.

Allocates what the memory plan has counted: scratch, slots, the predictor's weights. The model around it is the
family's (`flashsparse.models`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.cache import SlotTable
from flashsparse.choice import Chooser, Exact, Predicted, PredictedGate, Searched, Whole
from flashsparse.compact import CompactGate
from flashsparse.compressed import Compressed
from flashsparse.ffn import StreamedFFN
from flashsparse.flash import TYPICAL, Costs, Merging
from flashsparse.flash.curve import load_curve
from flashsparse.kernels.cpu import NativeKernels
from flashsparse.layer_files import Flash, Scratch, Tiles
from flashsparse.models.tensors import ffn_names, ffn_norm_name, scoring_name
from flashsparse.native.layers import Norm as NativeNorm
from flashsparse.pack.codec import Decoder, read_lengths
from flashsparse.places import cache_dir
from flashsparse.prefetch import NativePrefetch, Norm, Prefetch, Switch
from flashsparse.sparsity.predictors import ExactGate, make_predictor, scratch_sizes
from flashsparse.weights import Buffer, ResidentStore

if TYPE_CHECKING:
    from flashsparse.flash import ReadPool
    from flashsparse.kernels import Kernels
    from flashsparse.memory import MemoryPlan
    from flashsparse.opening import OpenPack
    from flashsparse.sizes import Passes, Sizes
    from flashsparse.stats import Counters


@dataclass
class Assembly:
    """Makes the layers of one engine. `store` holds the resident weights, `predictors` the predictor file's, if any.

    `unified`: slots lie in MLX's memory. `slabs`: each layer's, as far as allocated already, by an earlier plan; one of
    another size is not used.
    """

    pack: OpenPack
    tier: str
    plan: MemoryPlan
    pool: ReadPool
    kernels: Kernels
    store: ResidentStore
    predictors: ResidentStore | None
    switch: Switch
    merging: Merging = field(default_factory=Merging)
    costs: Costs = TYPICAL
    unified: bool = False
    decoder: Decoder | None = None
    slabs: Sequence[Buffer | None] = ()

    def layers(self, sizes: Sizes, passes: Passes, counters: Counters) -> list[StreamedFFN]:
        """Every layer of the pack, sharing one scratch."""
        m, scratch = self.pack.manifest, self._scratch(sizes, passes)
        curve = load_curve(cache_dir(), m.path)
        merging = self.merging if curve is None else curve.merging(m.record.stride)
        self.merging = replace(merging, longest=sizes.staging_bytes())
        self.costs = self.costs if curve is None else curve.costs()
        self.decoder = None if m.codec is None else Decoder(m.record.bytes, sizes.threads)
        choosers = self._choosers()
        made = [self._layer(index, chooser, scratch, counters) for index, chooser in enumerate(choosers)]
        for ffn, after in pairwise(made):
            ffn.after = after
        return made

    def _scratch(self, sizes: Sizes, passes: Passes) -> Scratch:
        return Scratch(
            hidden=np.empty(sizes.hidden_floats(passes), np.float32),
            out=np.empty((passes.chunk, self.pack.manifest.hidden_size), np.float32),
            tiles=Tiles((Buffer(passes.tile_bytes), Buffer(passes.tile_bytes)), passes.tile_bytes),
        )

    def _ffn(self, *arguments: Any) -> StreamedFFN:
        return StreamedFFN(*arguments)

    def _layer(self, index: int, chooser: Chooser, scratch: Scratch, counters: Counters) -> StreamedFFN:
        m, slots = self.pack.manifest, self.plan.slots[index]
        file, header = self.pack.files[index + 1], self.pack.headers[index + 1]
        flash = Flash(file, header.data_offset, m.intermediate_size, m.record.bytes, m.record.stride)
        flash.merging, flash.costs = self.merging, self.costs
        if self.decoder is not None:
            flash.compressed = Compressed(file.path, read_lengths(header, m.record.bytes), self.decoder)
        ffn = self._ffn(index, self.kernels, self.pool, flash, scratch, counters, chooser)
        ffn.ahead = isinstance(self.kernels, NativeKernels)  # whose products are done when they return
        ffn.predicts = self.tier == "predict" or m.gate == "compact"
        ffn.down_bias = self.store.vector(ffn_names(m.family, index).down + ".bias")
        if slots:
            ffn.table = SlotTable(m.intermediate_size, slots)
            ffn.slot_bytes = self.plan.slot_bytes
            ffn.slab = self._slab(index, slots * ffn.slot_bytes)
            if isinstance(self.kernels, NativeKernels) and flash.compressed is None:  # native rounds know no codec
                ffn.native = self.kernels.rounds(ffn)
            ffn.lookahead = self._lookahead(ffn)
        return ffn

    def _slab(self, index: int, nbytes: int) -> Buffer:
        slab = self.slabs[index] if self.slabs else None
        return slab if slab is not None and slab.nbytes == nbytes else Buffer(nbytes, self.unified)

    def _lookahead(self, ffn: StreamedFFN) -> Prefetch | NativePrefetch | None:
        """None where hints are off, where nothing is chosen, and where the FFN's input is not the normalized stream."""
        m = self.pack.manifest
        base = ffn_norm_name(m.family, m.config, ffn.layer)
        if self.switch.mode == "off" or base is None or not isinstance(ffn.chooser, Exact | Searched | Predicted):
            return None
        weight, bias = self.store.vector(f"{base}.weight"), self.store.vector(f"{base}.bias")
        assert weight is not None and ffn.table is not None and ffn.slab is not None
        eps, centred = m.config.get("rms_norm_eps", 1e-5), "rms_norm_eps" not in m.config
        if ffn.native is not None:
            assert isinstance(self.kernels, NativeKernels)
            norm = self.kernels.norm(weight, bias, eps, centred)
            early = self.kernels.hint(ffn.native, ffn.chooser, NativeNorm(weight, bias, eps, centred))
            return NativePrefetch(ffn.native, ffn.chooser, norm, self.switch, ffn.counters, early)
        return Prefetch(
            ffn.table, ffn.slab, ffn.slot_bytes, ffn.flash, self.pool, ffn.chooser, Norm(weight, bias, eps, centred),
            self.switch, ffn.counters,
        )  # fmt: skip

    def _choosers(self) -> list[Chooser]:
        m = self.pack.manifest
        if self.tier == "predict":
            return self._predicting()
        if m.gate == "none":
            return [Whole(m.intermediate_size)] * m.layers
        if m.gate == "compact":
            return self._searching()
        scores = np.empty((self.plan.chunk, m.intermediate_size), np.float32)
        return [Exact(self.kernels, *self._scoring(index), scores) for index in range(m.layers)]

    def _searching(self) -> list[Chooser]:
        m = self.pack.manifest
        mask = np.empty((self.plan.chunk, m.intermediate_size), np.uint8)
        gates = [scoring_name(m.family, layer) for layer in range(m.layers)]
        return [Searched(self.kernels, CompactGate.load(self.store, gate, m.hidden_size), mask) for gate in gates]

    def _scoring(self, layer: int) -> tuple[Any, np.ndarray | None]:
        """The resident scoring matrix and its bias."""
        names = ffn_names(self.pack.manifest.family, layer)
        base = names.gate or names.up
        return self.store.weight(base), self.store.vector(base + ".bias")

    def _predicting(self) -> list[Chooser]:
        m = self.pack.manifest
        sizes, wide_shape = scratch_sizes(m), (self.plan.chunk, m.intermediate_size)
        wide = np.empty(wide_shape, np.float32) if sizes.wide else None
        middle = np.empty(self.plan.chunk * sizes.middle, np.float32)
        scores, mask = np.empty(wide_shape, np.float32), np.empty(wide_shape, np.uint8)
        if m.gate == "full":
            assert wide is not None
            return [self._with_exact_gate(index, scores, mask, wide) for index in range(m.layers)]
        return [self._predicted(index, scores, mask, wide, middle) for index in range(m.layers)]

    def _rule(self, layer: int) -> tuple[float, int | None]:
        """Threshold and k of a layer's selection."""
        assert self.pack.manifest.predictor is not None
        spec = self.pack.manifest.predictor.layers[layer]
        return -math.inf if spec.threshold is None else spec.threshold, spec.k

    def _with_exact_gate(self, layer: int, scores: np.ndarray, mask: np.ndarray, activated: np.ndarray) -> Chooser:
        m = self.pack.manifest
        assert m.predictor is not None
        weight, bias = self._scoring(layer)
        if m.predictor.layers[layer].every:
            return Exact(self.kernels, weight, bias, activated)
        gate = ExactGate(self.kernels, weight, bias, m.activation.name == "silu", activated)
        return PredictedGate(self.kernels, gate, *self._rule(layer), scores, mask)

    def _predicted(
        self,
        layer: int,
        scores: np.ndarray,
        mask: np.ndarray,
        wide: np.ndarray | None,
        middle: np.ndarray,
    ) -> Chooser:
        m, weights = self.pack.manifest, self.predictors
        predictor = None if weights is None else make_predictor(m, layer, self.kernels, weights, wide, middle)
        if predictor is None:
            return Whole(m.intermediate_size)
        return Predicted(self.kernels, predictor, *self._rule(layer), scores, mask)
