"""Decode steps of one token in native code: neighbouring layers in one call, where they are of kinds that it knows.

Owns the decision which layers those are, and what their step counts. The path layer by layer
(`native_decoder.py`, `ffn.py`) stays for all else and computes the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashsparse.native.steps import Described, Steps
from flashsparse.prefetch import NativePrefetch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from flashsparse.choice import Chooser
    from flashsparse.ffn import StreamedFFN
    from flashsparse.kernels.cpu import NativeKernels
    from flashsparse.kvcache import KVCache
    from flashsparse.native.layers import Layer, Norm
    from flashsparse.native.rounds import Hint
    from flashsparse.native.steps import Shared
    from flashsparse.stats import Counters


@dataclass(frozen=True)
class Known:
    """A layer as it was described to the library: it is run natively while it is still that."""

    ffn: StreamedFFN
    chooser: Chooser
    lookahead: NativePrefetch | None
    hint: Hint | None

    @property
    def holds(self) -> bool:
        ffn = self.ffn
        return (
            ffn.chooser is self.chooser
            and ffn.lookahead is self.lookahead
            and ffn.native is not None
            and not ffn.dense
            and ffn.judging is None
        )

    @property
    def hinted(self) -> bool:
        """Whether nothing needs to be done for its reads ahead between the layer before and this one."""
        lookahead = self.lookahead
        return lookahead is None or not lookahead.switch.on or (self.hint is not None and lookahead.early is self.hint)


class NativeStep:
    """The layers of one decoder; None: one that is none of the library's kinds."""

    def __init__(self, steps: Steps, layers: list[Known | None], counters: Counters) -> None:
        self._steps, self._layers, self._counters = steps, layers, counters
        self._switch = next((layer.lookahead.switch for layer in layers if layer and layer.lookahead), None)
        self._caches: list[KVCache] | None = None
        self._observed = False

    def reach(self, first: int) -> int:
        """The layer up to which layers from `first` on can be run in one call now; `first` where it cannot."""
        for index in range(first, len(self._layers)):
            layer = self._layers[index]
            if layer is None or not layer.holds or (index > first and not layer.hinted):
                return index
        return len(self._layers)

    def run(self, first: int, end: int, h: np.ndarray, caches: list[KVCache], turns: int | None) -> None:
        """Take h [1, d], the shared one, through these layers, and advance their caches. Raises FlashReadError."""
        steps, offset, known = self._steps, caches[first].offset, self._layers[first]
        assert known is not None
        if known.ffn.wants_hint:
            known.ffn.hint(h)
        if caches is not self._caches:
            steps.place([cache.addresses for cache in caches], caches[0].capacity)
            self._caches = caches
        if not self._observed and any(layer is not None and layer.ffn.observer for layer in self._layers):
            steps.keep_ids()
            self._observed = True
        steps.begin(first, end, offset, turns, self._switch is not None and self._switch.on)
        try:
            while not steps.over:
                steps.go_on(self._counters.tally)
        finally:
            self._count(first, end)
        if known.lookahead is not None:
            known.lookahead.begun = False
        for cache in caches[first:end]:
            cache.offset = offset + 1

    def _count(self, first: int, end: int) -> None:
        attention_s, ffn_s = self._steps.seconds
        self._counters.attention_s += attention_s
        self._counters.ffn_s += ffn_s
        for layer, ids in zip(self._layers[first:end], map(self._steps.ids, range(first, end)), strict=True):
            if layer is not None and ids is not None:
                layer.ffn.count(ids, len(ids), 1)


def native_step(
    kernels: NativeKernels,
    attention: Sequence[Layer],
    ffns: Sequence[StreamedFFN],
    closing: Sequence[Norm],
    shared: Shared,
    counters: Counters,
) -> NativeStep | None:
    """None where no layer is of the kinds that the library knows."""
    described: list[Described | None] = []
    known: list[Known | None] = []
    for index, (layer, ffn) in enumerate(zip(attention, ffns, strict=True)):
        chosen, lookahead = kernels.chosen(ffn.chooser), ffn.lookahead
        if ffn.native is None or chosen is None or not isinstance(lookahead, NativePrefetch | None):
            described.append(None)
            known.append(None)
            continue
        hint = None if lookahead is None else lookahead.early
        norm = closing[index] if closing else None
        described.append(Described(layer, ffn.native, chosen, hint, ffn.down_bias, norm))
        known.append(Known(ffn, ffn.chooser, lookahead, hint))
    steps = kernels.steps(described, shared)
    return None if steps is None else NativeStep(steps, known, counters)
