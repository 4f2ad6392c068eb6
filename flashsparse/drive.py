"""The drive at work beside its curve: whether reads while decoding came as fast as the curve says they should.

Compares like with like: the mean request's size and the mean number in flight while any was. And what the time to the
first token comes to at the curve's rate in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashsparse.flash.curve import Curve
    from flashsparse.stats import Counters

LEAST_READS, LEAST_S = 500, 0.1  # below, the figures say nothing
START_S = 2.0  # allowed for imports and the first products, beside reading
FAR = 2.0  # times faster or slower than the curve, before it is worth a word


@dataclass(frozen=True)
class DriveRate:
    """Bytes per second while any read was in flight, and what the curve has for as many of that size, if anything."""

    rate: float
    in_flight: float
    expected: float | None

    @property
    def note(self) -> str | None:
        """One line when the two are far apart."""
        if self.expected is None or self.expected / FAR <= self.rate <= self.expected * FAR:
            return None
        return (
            f"reads came at {self.rate / 1e9:.2f} GB/s, {self.rate / self.expected:.1f} times what the drive's curve "
            f"says for {self.in_flight:.0f} in flight: measure it again with doctor --again"
        )

    def to_dict(self) -> dict[str, float | str | None]:
        return {"rate": self.rate, "in_flight": self.in_flight, "expected": self.expected, "note": self.note}


def drive_rate(cost: Counters, curve: Curve | None, mode: str) -> DriveRate | None:
    """Of the reads counted in `cost`, in read mode `mode`; None when they were too few."""
    if cost.flash_reads < LEAST_READS or cost.reading_s < LEAST_S:
        return None
    depth = cost.in_flight_s / cost.reading_s
    expected = None if curve is None else curve.at(cost.flash_bytes / cost.flash_reads, depth, mode)
    return DriveRate(cost.flash_bytes / cost.reading_s, depth, expected)


def start_limit(resident_bytes: int, prefill: Counters, curve: Curve | None) -> float | None:
    """Seconds from loading to the first token, were all of it read in order: resident weights, prompt's records."""
    return None if curve is None else (resident_bytes + prefill.needed_bytes) / curve.sequential + START_S
