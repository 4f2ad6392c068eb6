"""When memory that the GPU reads may be written again: after every output that read it has been evaluated.

MLX evaluates late and Metal does not track hazards in shared memory, so nothing else protects a slot that is read by a
computation still under way (docs/metal.md). Owns the rule and the count of the host's waits for the GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from flashsparse.errors import RefillError

if TYPE_CHECKING:
    from flashsparse.stats import Counters


class Timeline:
    """What the host knows of how far the GPU is. Every wait is counted as one read-back."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._issued = self._passed = 0
        self._fired: list[mx.array] = []
        self._beside: list[mx.array] = []

    def issue(self) -> int:
        """The number of an output that was not evaluated yet."""
        self._issued += 1
        return self._issued

    def wait(self, *arrays: mx.array) -> None:
        """Wait until `arrays` are evaluated, and what was to come beside them."""
        beside, self._beside = self._beside, []
        mx.eval(*arrays, *beside)
        self._counters.readbacks += 1

    def beside(self, *arrays: mx.array) -> None:
        """Read `arrays` back with whatever is waited for next."""
        self._beside += arrays

    def later(self, fired: mx.array) -> None:
        """Add this number to the counter `fired` at the next `finish`."""
        self._fired.append(fired)

    def finish(self, result: mx.array) -> None:
        """Wait for `result`, which depends on every output issued so far."""
        fired, self._fired = self._fired, []
        self.wait(result, *fired)
        self._counters.fired += sum(int(np.array(each)) for each in fired)
        self._passed = self._issued

    def passed(self, number: int) -> bool:
        """Whether output `number` is known to be evaluated."""
        return number <= self._passed


@dataclass
class _Lease:
    number: int
    output: mx.array
    slots: np.ndarray
    generations: np.ndarray


@dataclass
class Refills:
    """One slab's slots: which outputs may still read them. A slot's generation counts what it has held.

    `debug`: also check, when an output is evaluated, that its slots still held what they did when it was made. On with
    Python's development mode (python -X dev).
    """

    timeline: Timeline
    slots: int
    debug: bool = field(default_factory=lambda: sys.flags.dev_mode)
    generation: np.ndarray = field(init=False)
    _leases: list[_Lease] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generation = np.zeros(self.slots, np.int64)

    def reading(self, slots: np.ndarray, output: mx.array) -> None:
        """`output`, which is not evaluated yet, reads `slots` as they are now."""
        generations = self.generation[slots] if self.debug else self.generation[:0]
        self._leases.append(_Lease(self.timeline.issue(), output, slots, generations))

    def settle(self) -> None:
        """Wait for the outputs that may still read a slot. Raises RefillError when one of theirs was refilled."""
        leases, self._leases = self._leases, []
        late = [lease.output for lease in leases if not self.timeline.passed(lease.number)]
        if late:
            self.timeline.wait(*late)
        if not self.debug:
            return
        for lease in leases:
            changed = self.generation[lease.slots] != lease.generations
            if changed.any():
                raise RefillError(
                    f"slots {lease.slots[changed][:8].tolist()} were refilled before an output that read them"
                )

    def refilling(self, slots: np.ndarray) -> None:
        """Called before anything writes into `slots`. Raises RefillError while an output may still read one of them."""
        for lease in self._leases:
            if not self.timeline.passed(lease.number) and np.isin(slots, lease.slots).any():
                raise RefillError(
                    f"{len(slots)} slots are to be refilled while output {lease.number} may still read them"
                )
        self.generation[slots] += 1
