"""Puts the layers of an engine on the GPU together: `flashsparse.assembly` with MLX's memory and choosers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.assembly import Assembly
from flashsparse.compact import CompactGate
from flashsparse.ffn import StreamedFFN
from flashsparse.kernels.metal import MetalKernels, vector
from flashsparse.layer_files import Scratch, Tiles
from flashsparse.metal.choice import (
    Everything,
    Gate,
    MetalChooser,
    Predict,
    PredictGate,
    Search,
    by_copy,
    by_factors,
    by_value,
)
from flashsparse.metal.ffn import MetalFFN, MetalScratch
from flashsparse.metal.places import Place
from flashsparse.metal.prefetch import MetalPrefetch, Norm
from flashsparse.metal.refills import Refills
from flashsparse.metal.walk import Lookup
from flashsparse.models.tensors import ffn_norm_name, scoring_name
from metal_kernels.candidates import CompactCopy
from metal_kernels.value import Copy

if TYPE_CHECKING:
    from flashsparse.choice import Chooser
    from flashsparse.sizes import Passes, Sizes
    from flashsparse.stats import Counters


@dataclass
class MetalAssembly(Assembly):
    """As Assembly; its `kernels` are MetalKernels."""

    unified: bool = True

    @property
    def metal(self) -> MetalKernels:
        kernels: Any = self.kernels
        assert isinstance(kernels, MetalKernels)
        return kernels

    def _scratch(self, sizes: Sizes, passes: Passes) -> Scratch:
        m, tile_bytes = self.pack.manifest, passes.tile_bytes
        buffers = self.metal.buffer(tile_bytes), self.metal.buffer(tile_bytes)
        room = min(m.intermediate_size, tile_bytes // m.record.bytes + 1)
        size = np.broadcast_to(np.float32(0), (sizes.hidden_floats(passes),))  # of no memory: its length is asked for
        places = {
            tile.address: Place(self.metal, tile, room, m.intermediate_size, Refills(self.metal.timeline, 1))
            for tile in buffers
        }
        return MetalScratch(size, size, Tiles(buffers, tile_bytes), tiles_at=places)

    def _ffn(self, *arguments: Any) -> StreamedFFN:
        return MetalFFN(*arguments)

    def _layer(self, index: int, chooser: Chooser, scratch: Scratch, counters: Counters) -> StreamedFFN:
        ffn = super()._layer(index, chooser, scratch, counters)
        assert isinstance(ffn, MetalFFN)
        ffn.bias, ffn.down_bias = vector(ffn.down_bias), None
        if ffn.slab is not None and ffn.table is not None:
            slots = ffn.table.slots
            refills = Refills(self.metal.timeline, slots)
            ffn.place = Place(self.metal, ffn.slab, slots, self.pack.manifest.intermediate_size, refills)
            if ffn.lookahead is not None:
                ffn.prefetch.refills = refills
        return ffn

    def layers(self, sizes: Sizes, passes: Passes, counters: Counters) -> list[StreamedFFN]:
        made = super().layers(sizes, passes, counters)
        layers = [ffn for ffn in made if isinstance(ffn, MetalFFN)]
        if self.switch.mode == "token" and self._plan(layers):
            return made
        for ffn, after in pairwise(each for each in layers if _reads_back(each)):
            if after.lookahead is not None:
                ffn.named_here = (after,)
        return made

    def _plan(self, layers: list[MetalFFN]) -> bool:
        """Have the first layer that reads back a list plan all later ones, if each of those can go without one."""
        first = next((i for i, ffn in enumerate(layers) if _reads_back(ffn)), len(layers))
        later = layers[first + 1 :]
        if not later or any(ffn.lookahead is None for ffn in later):
            return False
        for ffn in later:
            assert ffn.place is not None and ffn.table is not None
            ffn.lookup = Lookup(ffn.place, ffn.table, ffn.slot_bytes)
        layers[first].named_here = self.metal.walk.layers = tuple(later)
        return True

    def _lookahead(self, ffn: StreamedFFN) -> MetalPrefetch | None:
        """None where hints are off, where nothing is chosen, and where the FFN's input is not the normalized stream."""
        m = self.pack.manifest
        base = ffn_norm_name(m.family, m.config, ffn.layer)
        if self.switch.mode == "off" or base is None or not _reads_back(ffn):
            return None
        weight, bias = (vector(self.store.vector(f"{base}.{part}")) for part in ("weight", "bias"))
        assert weight is not None and ffn.table is not None and ffn.slab is not None
        norm: Any = Norm(weight, bias, m.config.get("rms_norm_eps", 1e-5), layer="rms_norm_eps" not in m.config)
        guess: Any = ffn.chooser
        return MetalPrefetch(
            ffn.table, ffn.slab, ffn.slot_bytes, ffn.flash, self.pool, guess, norm, self.switch, ffn.counters
        )

    def _choosers(self) -> list[Any]:
        for store in self.pack.stores:
            self.metal.adopt(store)
        return [self._chooser(index) for index in range(self.pack.manifest.layers)]

    def _chooser(self, layer: int) -> MetalChooser:
        m = self.pack.manifest
        if self.tier == "predict":
            return self._predict(layer)
        if m.gate == "none":
            return Everything(m.intermediate_size)
        return self._search(layer) if m.gate == "compact" else self._gate(layer)

    def _gate(self, layer: int) -> Gate:
        weight, bias = self._scoring(layer)
        return Gate(self.metal, self.metal.stored(weight), vector(bias), self.pack.manifest.intermediate_size)

    def _search(self, layer: int) -> Search:
        m = self.pack.manifest
        gate = CompactGate.load(self.store, scoring_name(m.family, layer), m.hidden_size)
        high, low, scales, errors = (
            self.metal.views.of(part) for part in (gate.high, gate.low, gate.scales, gate.errors)
        )
        copy = CompactCopy(high, low, scales, errors, vector(gate.bias))
        return Search(self.metal, copy, m.activation.param, m.intermediate_size)

    def _predict(self, layer: int) -> MetalChooser:
        m = self.pack.manifest
        assert m.predictor is not None
        spec, (threshold, k) = m.predictor.layers[layer], self._rule(layer)
        if m.gate == "full":
            gate = self._gate(layer)
            if spec.every:
                return gate
            product = self.metal.product(self._scoring(layer)[0])
            return PredictGate(self.metal, gate, product, threshold, k, m.activation.name == "silu")
        if spec.every or self.predictors is None:
            return Everything(m.intermediate_size)
        return Predict(self.metal, self._scorer(layer), threshold, k, m.intermediate_size)

    def _scorer(self, layer: int) -> Any:
        m, store, base = self.pack.manifest, self.predictors, f"layers.{layer}"
        assert m.predictor is not None and store is not None
        if m.predictor.score == "low_rank":
            fc1, fc2 = (self.metal.product(store.weight(f"{base}.{name}")) for name in ("fc1", "fc2"))
            bias = vector(store.vector(f"{base}.fc2.bias"))
            return by_factors(self.metal, fc1, fc2, bias, m.predictor.layers[layer].relu)
        gate = self._copy(f"{base}.gate")
        if m.predictor.score == "gate_copy":
            return by_copy(gate, m.activation.name == "silu")
        norms = vector(store.tensor(f"{base}.down_norm"))
        assert norms is not None
        return by_value(self.metal, gate, self._copy(f"{base}.up") if m.gated else None, norms)

    def _copy(self, base: str) -> Copy:
        assert self.predictors is not None
        kept = self.metal.stored(self.predictors.weight(base))
        assert kept.scales is not None and kept.biases is not None
        return Copy(kept.data, kept.scales, kept.biases, kept.bits, vector(self.predictors.vector(f"{base}.bias")))


def _reads_back(ffn: StreamedFFN) -> bool:
    """Whether a layer's list is made on the GPU."""
    chooser: Any = ffn.chooser
    return not isinstance(chooser, Everything)
