"""The native C++ kernels on the CPU, for one pack: translates weights and manifest into what the C interface takes.

Owns the compute threads. Synchronous: when a call returns, its result is written and nothing reads its operands any
more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flashsparse import native
from flashsparse.choice import Exact, Predicted, Searched
from flashsparse.flash.reader import STAGING_BYTES
from flashsparse.native.compact import Compact, candidates
from flashsparse.native.layers import Norm
from flashsparse.native.rounds import Hint, Home, LayerRounds, Rounds
from flashsparse.native.steps import Chosen, Described, Shared, Steps
from flashsparse.sparsity.predictors import GateCopy

if TYPE_CHECKING:
    from flashsparse.choice import Chooser
    from flashsparse.compact import CompactGate
    from flashsparse.ffn import StreamedFFN
    from flashsparse.kvcache import KVCache
    from flashsparse.pack.manifest import Manifest
    from flashsparse.weights import Weight


class NativeKernels:
    """Implements flashsparse.kernels.Kernels. Raises NativeLibraryError when the library is missing."""

    name = "native"

    def __init__(self, manifest: Manifest, threads: int) -> None:
        self.workers = native.Workers(threads)
        self._activation = native.ACTIVATIONS[manifest.activation.name]
        self._param = manifest.activation.param or 0.0
        self._record = _record(manifest)
        self._matrices: dict[str, native.Matrix] = {}
        self._copies: dict[str, Compact] = {}
        self._rounds: Rounds | None = None  # shared by the layers of the one engine that these kernels belong to

    def linear(self, weight: Weight, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
        native.linear(self.workers, self.matrix(weight), bias, x, out)

    def score(self, weight: Weight, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
        native.score(self.workers, self.matrix(weight), bias, x, out)

    def select(self, scores: np.ndarray, threshold: float, k: int | None, mask: np.ndarray, ids: np.ndarray) -> int:
        return native.select(scores, threshold, k, mask, ids)

    def candidates(self, gate: CompactGate, x: np.ndarray, mask: np.ndarray, ids: np.ndarray) -> int:
        return candidates(self.workers, self._copy(gate), x, self._activation, self._param, mask, ids)[0]

    def _copy(self, gate: CompactGate) -> Compact:
        copy = self._copies.get(gate.name)
        if copy is None:
            parts = gate.high, gate.low, gate.scales, gate.errors, gate.bias
            copy = self._copies[gate.name] = Compact(*parts, gate.cols)
        return copy

    def gather(self, weight: Weight, ids: np.ndarray, out: np.ndarray) -> None:
        native.gather(self.matrix(weight), ids, out)

    def attention(self, q: np.ndarray, cache: KVCache, window: int, scale: float, out: np.ndarray) -> None:
        position = cache.offset - q.shape[0]
        native.attention(self.workers, q, cache.keys, cache.values, cache.dtype, position, window, scale, out)

    def activate(self, scores: np.ndarray) -> None:
        native.activate(scores, self._activation, self._param)

    def active(self, activated: np.ndarray) -> np.ndarray:
        return native.active(activated)

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
        native.ffn_hidden(self.workers, self._record, slab, offsets, ids, cols, x, activated, mask, hidden)

    def down(self, slab: np.ndarray, offsets: np.ndarray, cols: np.ndarray, hidden: np.ndarray, y: np.ndarray) -> None:
        native.ffn_down(self.workers, self._record, slab, offsets, cols, hidden, y)

    def norm(
        self, weight: np.ndarray, bias: np.ndarray | None, eps: float, centred: bool
    ) -> Callable[[np.ndarray], np.ndarray]:
        """A function that gives a new array: RMSNorm of h [T, d], or LayerNorm when `centred`."""
        norm = Norm(weight, bias, eps, centred)

        def normalized(h: np.ndarray) -> np.ndarray:
            x = np.empty_like(h)
            norm(self.workers, h, x)
            return x

        return normalized

    def rounds(self, ffn: StreamedFFN) -> LayerRounds:
        """The native rounds of a layer that has slots."""
        assert ffn.table is not None and ffn.slab is not None
        if self._rounds is None:
            self._rounds = Rounds(ffn.pool, self.workers)
        flash = ffn.flash
        home = Home(
            flash.file.path, flash.file.fd, flash.data_offset, flash.record_bytes, flash.stride, flash.file.sector,
            flash.merging.gap, min(flash.merging.longest, STAGING_BYTES),
        )  # fmt: skip
        table = ffn.table
        return LayerRounds(self._rounds, home, self._record, table.native, table.begin, ffn.slab.bytes, ffn.slot_bytes)

    def hint(self, rounds: LayerRounds, chooser: Chooser, norm: Norm) -> Hint | None:
        """How the layer before guesses what `chooser` will name; None for choosers whose scores are not one product."""
        if isinstance(chooser, Exact):
            least = float(np.finfo(np.float32).smallest_subnormal)
            kind = self._activation, self._param
            return Hint(rounds, norm, self.matrix(chooser.scoring), chooser.bias, least, kind)
        predictor = chooser.predictor if isinstance(chooser, Predicted) and chooser.k is None else None
        if not isinstance(predictor, GateCopy) or predictor.magnitude:
            return None
        assert isinstance(chooser, Predicted)
        return Hint(rounds, norm, self.matrix(predictor.gate), predictor.bias, chooser.threshold)

    def chosen(self, chooser: Chooser) -> Chosen | None:
        """How a native step chooses what `chooser` does for one token; None for choosers of more than one product."""
        if isinstance(chooser, Exact):
            scoring, scores = self.matrix(chooser.scoring), chooser.scores[0]
            return Chosen.active(scoring, chooser.bias, scores, self._activation, self._param)
        if isinstance(chooser, Searched):
            return Chosen.candidates(self._copy(chooser.gate), chooser.mask[0], self._activation, self._param)
        predictor = chooser.predictor if isinstance(chooser, Predicted) else None
        if not isinstance(predictor, GateCopy) or predictor.magnitude:
            return None
        assert isinstance(chooser, Predicted)
        scoring, scores, mask = self.matrix(predictor.gate), chooser.scores[0], chooser.mask[0]
        return Chosen.scored(scoring, predictor.bias, scores, mask, chooser.threshold, chooser.k)

    def steps(self, layers: Sequence[Described | None], shared: Shared) -> Steps | None:
        """Steps of one token through layers whose rounds these kernels have made; None where there are none."""
        if self._rounds is None or not any(layers):
            return None
        return Steps(self.workers, self._rounds, self._record, layers, shared)

    def close(self) -> None:
        self.workers.close()

    def matrix(self, weight: Weight) -> native.Matrix:
        """The C view of a weight; kept, because building it costs more than a small product."""
        found = self._matrices.get(weight.name)
        if found is None:
            found = self._matrices[weight.name] = _matrix(weight)
        return found


def _matrix(weight: Weight) -> native.Matrix:
    if weight.quant is None:
        dtype = native.DTYPES[weight.dtype]
        return native.Matrix(weight.data.ctypes.data, weight.rows, weight.cols, dtype, keep=weight.data)
    assert weight.scales is not None and weight.biases is not None
    return native.Matrix(
        weight.data.ctypes.data,
        weight.rows,
        weight.cols,
        native.DTYPES[f"Q{weight.quant.bits}"],
        weight.scales.ctypes.data,
        weight.biases.ctypes.data,
        native.DTYPES[weight.dtype],
        weight.quant.group_size,
        keep=(weight.data, weight.scales, weight.biases),
    )


def _record(manifest: Manifest) -> native.Record:
    fields = {name: field.offset for name, field in manifest.record.fields.items()}
    stored = native.DTYPES[manifest.source_dtype]
    return native.Record(
        **{name: fields.get(name, -1) for name in ("gate", "gate_bias", "up", "up_bias", "down")},
        d=manifest.hidden_size,
        dtype=native.DTYPES[f"Q{manifest.quant.bits}"] if manifest.quant else stored,
        scale_dtype=stored,
        group_size=manifest.quant.group_size if manifest.quant else 0,
        activation=native.ACTIVATIONS[manifest.activation.name],
        param=manifest.activation.param or 0.0,
        gated=manifest.gated,
    )
