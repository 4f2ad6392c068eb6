"""The streamed FFN on the GPU: hits are launched, misses are read meanwhile and launched when they are there.

Differs from `StreamedFFN` in that outputs are late: what was launched may still run when a call returns, so slots and
lists are written only when `Refills` says that nobody reads them any more. Tiles are computed while the next is read,
and waited for. Results do not depend on slots, rounds or arrival, as on the CPU.

With lookahead, later layers' hints come back with a layer's list, and their reads begin after its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from flashsparse.ffn import StreamedFFN
from flashsparse.layer_files import Scratch
from flashsparse.metal.places import Place, Sum
from flashsparse.metal.prefetch import MetalPrefetch
from metal_kernels import select, sparse_ffn

if TYPE_CHECKING:
    from flashsparse.cache import Round
    from flashsparse.flash import Batch
    from flashsparse.keeping import Keeping
    from flashsparse.kernels.metal import MetalKernels
    from flashsparse.metal.choice import MetalChoice
    from flashsparse.metal.walk import Late, Lookup


class Values:
    """Where a tile's intermediate values are put until they are added up."""

    def __init__(self) -> None:
        self.values: mx.array | None = None


@dataclass
class MetalScratch(Scratch):
    """Only sizes are needed: MLX allocates what is computed. `tiles_at`: a tile's place by its address."""

    tiles_at: dict[int, Place] = field(default_factory=dict)

    def hidden_for(self, tokens: int, width: int) -> Any:
        return Values()


@dataclass
class MetalFFN(StreamedFFN):
    """One layer; `place` is its slab's. Arrays are MLX's where `StreamedFFN` has numpy's: x [T, d] float32."""

    place: Place | None = None
    bias: mx.array | None = None
    lookup: Lookup | None = None
    choice: MetalChoice | None = None  # of the step under way
    known: MetalChoice | None = None  # of a step that begins: its list was read back already
    named_here: tuple[MetalFFN, ...] = ()  # later layers whose hints come back with this one's list
    state: mx.array | None = None  # [1, d]: the residual stream before this layer, in a step of one token
    hints: list[Callable[[], None]] = field(default_factory=list)  # to begin when this layer's reads have begun

    def __call__(self, x: Any) -> Any:
        """x [T, d] float32 -> the FFN's output [T, d] float32, late."""
        began, hinted = time.perf_counter(), self.counters.hint_s
        made = self._without_list(x) if self._blind() else self._with_list(x)
        y = mx.zeros(x.shape) if made is None else sparse_ffn.total(made)
        self.counters.ffn_s += time.perf_counter() - began - (self.counters.hint_s - hinted)
        return y if self.bias is None else y + self.bias

    @property
    def prefetch(self) -> MetalPrefetch:
        assert isinstance(self.lookahead, MetalPrefetch)
        return self.lookahead

    def _blind(self) -> bool:
        return self.lookup is not None and self._metal().walk.blind

    def _with_list(self, x: Any) -> mx.array | None:
        """The segments' sums; None when nothing was added. One read-back, if the neurons fit in the slots."""
        total: Any = Sum()
        choice: Any = self.known
        if choice is None:
            self._name_ahead(x.shape[0])
            choice = self.chooser.whole(x) if self.dense else self.chooser.choose(x)
        self.known, self.choice = None, choice
        self._compute(choice, x, total)
        self._begin_hints()
        return total.partial

    def _name_ahead(self, tokens: int) -> None:
        """Have later layers' hints come back with this one's list."""
        state, self.state, self.hints = self.state, None, []
        if tokens > 1 or state is None:
            return
        for ffn in self.named_here:
            if ffn.wants_hint:
                guessed = ffn.prefetch.guess(state)
                self._metal().timeline.beside(guessed)
                self.hints.append(partial(ffn.prefetch.hint, guessed))

    def _begin_hints(self) -> None:
        began = time.perf_counter()
        hints, self.hints = self.hints, []
        for hint in hints:
            hint()
        self.counters.hint_s += time.perf_counter() - began

    def _without_list(self, x: Any) -> mx.array:
        """The segments' sums over what is in slots; the walk learns what was not. No read-back."""
        assert self.place is not None and self.lookup is not None and self.table is not None
        chooser: Any = self.chooser
        self.prefetch.land()
        self.place.refills.settle()
        named = chooser.named(x)
        ids, count, _ = select.compact(named.bits, self.flash.records)
        made, totals, fired = self.lookup.compute(self.table, ids, count, x, named.activated)
        kernels = self._metal()
        kernels.walk.note(self, ids=ids, count=count, activated=named.activated, totals=totals, fired=fired)
        kernels.timeline.beside(ids, count, totals, fired)
        mx.async_eval(made)
        return made

    def account(self, late: Late, stands: bool) -> None:
        """Count what was done without a list, now that it was read back; all that if it `stands`."""
        ids = late.choice.ids
        self.prefetch.account(ids)
        if not stands:
            return
        assert self.table is not None
        self._count_choice(late.choice, 1)  # type: ignore[arg-type]
        for round_ in self.table.rounds(ids):
            self._count_round(round_, round_.missing)
            round_.commit()
        self.table.end_token()
        if self.predicts:
            self.counters.fired += int(np.array(late.fired))

    def _metal(self) -> MetalKernels:
        kernels: Any = self.kernels
        assert kernels is not None
        return kernels

    def _hidden(self, x: Any, choice: Any, slab: Any, offsets: Any, ids: Any, cols: Any, hidden: Any) -> None:
        """A tile's records, all of them at once."""
        place = self._tile(slab)
        place.hits.write(offsets, ids, np.searchsorted(choice.ids, ids))
        place.order(offsets, cols, ids)
        hidden.values = place.hidden(place.hits, x, choice)

    def _down(self, slab: Any, offsets: Any, cols: Any, hidden: Any, y: Any) -> None:
        """Add a tile's records and wait: the tile is read into next."""
        self._tile(slab).add(hidden.values, y)
        self._fired(hidden.values)
        self._metal().timeline.wait(y.partial)

    def _tile(self, slab: np.ndarray) -> Place:
        assert isinstance(self.scratch, MetalScratch)
        return self.scratch.tiles_at[slab.ctypes.data]

    def _fired(self, hidden: mx.array) -> None:
        if self.predicts and not self.dense:
            self._metal().timeline.later((hidden != 0).sum())

    def _keeping(self, choice: Any, tokens: int) -> Keeping | None:
        if self.place is not None:
            self.place.refills.settle()  # what is kept is copied into slots
        return super()._keeping(choice, tokens)

    def _submit(self, round_: Round, missing: np.ndarray) -> Batch:
        assert self.place is not None
        self.place.refills.refilling(round_.slots[missing])
        return super()._submit(round_, missing)

    def _round(self, round_: Round, x: Any, y: Any, compute_hidden: Any, ahead: Any) -> None:
        """Submit the misses, launch the hits, and the misses once all are there; one sum over both, in order."""
        assert self.place is not None
        place = self.place
        place.refills.settle()
        hits, misses = np.flatnonzero(~round_.missing), np.flatnonzero(round_.missing)
        parts = []
        if len(misses):
            parts += self._read(round_, hits, x, ahead)
        else:
            self._count_round(round_, round_.missing)
            parts += self._launch(place.hits, round_, hits, x)
        parts += self._launch(place.misses, round_, misses, x)
        round_.commit()
        cols = np.empty(len(round_.ids), np.int32)
        cols[np.concatenate([hits, misses])] = np.arange(len(cols))
        place.order(self._offsets(round_), cols, round_.ids)
        hidden = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        place.add(hidden, y)
        self._fired(hidden)
        place.refills.reading(round_.slots, y.partial)

    def _read(self, round_: Round, hits: np.ndarray, x: Any, ahead: Any) -> list[mx.array]:
        """Read what is missing and not on its way, launch the hits, and wait until everything is there."""
        assert self.place is not None
        missing = round_.missing.copy()
        missing[round_.ahead] = False
        self._count_round(round_, missing)
        with self._submit(round_, np.flatnonzero(missing)) as batch:
            parts = self._launch(self.place.hits, round_, hits, x)
            mx.async_eval(*parts)
            self._begin_hints()
            late = self._compute_ahead(round_, ahead, lambda arrived: None)
            self._wait(batch)
        if len(late):  # a read ahead failed
            with self._submit(round_, late) as batch:
                self._wait(batch)
        return parts

    def _wait(self, batch: Batch) -> None:
        while len(self._take(batch)):
            pass

    def _launch(self, part: Any, round_: Round, which: np.ndarray, x: mx.array) -> list[mx.array]:
        """The intermediate values of the records at positions `which` of the round; none without any."""
        if not len(which):
            return []
        assert self.place is not None and self.choice is not None
        ids = round_.ids[which]
        part.write(self._offsets(round_)[which], ids, np.searchsorted(self.choice.ids, ids))
        return [self.place.hidden(part, x, self.choice)]
