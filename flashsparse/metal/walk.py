"""A token through the layers without read-backs between them, as far as it goes: planned once, verified at the end.

The first layer that reads back a list reads back hints for all later ones with it: a whole-token plan from an early
state, beside the window that is in the slots anyway. Those layers then find their records by the slot table on the GPU
and leave out what is in no slot. How much that was comes back with the logits. Nothing missed, and the token is what it
would be layer by layer, to the bit. Else everything up to the first layer that missed stands, and from there on the
token is computed layer by layer, with what the others named as hints.

Owns what that takes to remember: outputs of modules in the order of their calls, and what each layer named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from flashsparse.metal.choice import MetalChoice
from flashsparse.metal.shared import Shared
from metal_kernels import select, sparse_ffn

if TYPE_CHECKING:
    from flashsparse.cache import SlotTable
    from flashsparse.metal.ffn import MetalFFN
    from flashsparse.metal.places import Place


@dataclass
class Late:
    """What a layer did without the host, read back later. ids int32 [I], the first `count` of them; activated [1, I];
    totals: how many hits, how many misses; fired: how many values are not zero. `at`: modules called before it."""

    ffn: MetalFFN
    at: int
    ids: mx.array
    count: mx.array
    activated: mx.array | None
    totals: mx.array
    fired: mx.array

    @cached_property
    def choice(self) -> MetalChoice:
        found = np.array(self.ids, copy=False)[: int(np.array(self.count, copy=False)[0])]
        return MetalChoice(found, self.ids.shape[0], self.activated)

    @property
    def missed(self) -> int:
        return int(np.array(self.totals, copy=False)[1])

    def hint(self) -> None:
        """Start reading what the layer named for a state that lacked something."""
        named = np.zeros(self.ids.shape[0], np.float32)
        named[self.choice.ids] = 1
        self.ffn.prefetch.begin(named, 1.0)


class Lookup:
    """A layer's slot table where the GPU reads it, and the sum over the records that are in slots."""

    def __init__(self, place: Place, table: SlotTable, slot_bytes: int) -> None:
        self.place, self.slot_bytes = place, slot_bytes
        self._slot_of, self._begin = Shared(table.records, "int32"), Shared(table.slots, "int32")
        self._slots = np.arange(table.slots)

    def compute(
        self, table: SlotTable, ids: mx.array, count: mx.array, x: mx.array, activated: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Of the first `count` ids and x [1, d]: the segments' sums over those in slots, totals [2], how many fired.

        Nothing of an earlier call may be under way, and nothing be written into the slab until all is evaluated.
        """
        self._slot_of.host[:], self._begin.host[:] = table.native.slot_of, table.begin
        _, offsets, cols, _, _, totals = select.lookup(
            ids, count, self._slot_of.array, self._begin.array, self.slot_bytes
        )
        hits, record, slab = totals[:1], self.place.kernels.record, self.place.buffer.array
        at = mx.arange(ids.shape[0])
        inside = at < hits  # what is beyond is undefined
        found = mx.where(inside, mx.take(ids, mx.where(inside, cols, 0)), 0)
        gates = None if activated is None else mx.take(activated, found, axis=1)
        hidden = sparse_ffn.hidden(record, slab, offsets, hits, x, gates)
        bounds = sparse_ffn.segment_bounds(found, hits, table.records)
        partial = sparse_ffn.down(record, slab, offsets, at, bounds, hidden)
        self.place.refills.reading(self._slots, partial)
        return partial, totals, ((hidden != 0) & inside).sum()


@dataclass
class Walk:
    """An engine's. `layers`: those that can go without a list, all that come after the one that plans."""

    layers: Sequence[MetalFFN] = ()
    blind: bool = False  # layers go without lists
    _kept: list[mx.array] = field(default_factory=list)
    _late: list[Late] = field(default_factory=list)
    _replaying: int = 0  # of what is kept

    @property
    def wanted(self) -> bool:
        """Whether the next step of one token should be such a walk."""
        return bool(self.layers) and all(ffn.wants_hint for ffn in self.layers)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """One token's walk; whatever ends it, nothing is left of it."""
        self.blind = True
        try:
            yield
        finally:
            self.blind = False
            for late in self._late:
                late.ffn.known = None
            self._kept, self._late, self._replaying = [], [], 0

    def replayed(self) -> mx.array | None:
        """The output of the module that is called, if it stands from before; modules are called in one order."""
        if not self._replaying:
            return None
        self._replaying -= 1
        return self._kept[-1 - self._replaying]

    def keep(self, output: mx.array) -> mx.array:
        """Note the output of a module that was computed."""
        if self.blind:
            self._kept.append(output)
        return output

    def note(self, ffn: MetalFFN, **found: Any) -> None:
        """What a layer did."""
        self._late.append(Late(ffn, len(self._kept), **found))

    def verify(self) -> bool:
        """After everything was read back: whether the token stands. If not, the next pass goes on where it failed."""
        missed = [index for index, late in enumerate(self._late) if late.missed]
        last = missed[0] if missed else len(self._late)
        for index, late in enumerate(self._late):
            late.ffn.account(late, stands=index < last)
        if not missed:
            return True
        first, *rest = self._late[last:]
        del self._kept[first.at :]
        self._replaying, self.blind = first.at, False
        first.ffn.known, first.ffn.hints = first.choice, [late.hint for late in rest]
        return False
