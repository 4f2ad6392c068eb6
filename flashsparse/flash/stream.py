"""The streaming plan: how the records of a set pass through tiles, in the order of their file.

A tile is filled by several requests, each for a stretch of the file that holds neighbouring records. How long a gap
between two records may be is chosen for the set at hand, by what requests cost the drive. Knows bytes and offsets only;
which records are read, and the tiles, are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flashsparse.flash.file import FlashFile, read_range

SPLIT = 1 << 20  # a request is cut into pieces of this size, so that the pool's threads share it
ALIGN = 64  # of where a stretch begins in its tile
CLEARLY = 1.2  # times cheaper: by less, a curve that is off by a tenth would have bytes read in vain
GAPS = (0, *(4096 << power for power in range(12)))  # bytes between records that are tried: up to 8 MiB


@dataclass(frozen=True)
class Costs:
    """What one request costs by its bytes, when as many run as serve the drive best; linear between, and beyond.

    The unit does not matter. `sizes` ascend, and `costs` never fall.
    """

    sizes: tuple[int, ...]
    costs: tuple[float, ...]

    def of(self, lengths: np.ndarray) -> float:
        """All requests of `lengths` bytes together."""
        slope = (self.costs[-1] - self.costs[-2]) / (self.sizes[-1] - self.sizes[-2])
        beyond = np.maximum(lengths - self.sizes[-1], 0).sum() * slope
        return float(np.interp(lengths, self.sizes, self.costs).sum() + beyond)


TYPICAL = Costs((0, SPLIT), (16 << 10, SPLIT + (16 << 10)))  # without a measured curve: a request is worth 16 KiB


@dataclass(frozen=True)
class Load:
    """What fills one tile with the records `first` to `last` - 1 of those asked for.

    offsets [last - first]: where in the tile each record begins. The requests, [k] each: `starts` in the file,
    `lengths`, `needs` (bytes that must arrive), `places` in the tile.
    """

    first: int
    last: int
    offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    needs: np.ndarray
    places: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum())


def best_gap(costs: Costs, starts: np.ndarray, ends: np.ndarray) -> int:
    """The gap between the stretches `starts` to `ends` of a file that requests should read in vain: one of GAPS.

    The shortest with which no other is CLEARLY cheaper.
    """
    between = starts[1:] - ends[:-1]
    choices = []
    for gap in GAPS:
        breaks = np.flatnonzero(between > gap)
        first, last = np.append(0, breaks + 1), np.append(breaks, len(starts) - 1)
        choices.append((costs.of(ends[last] - starts[first]), gap))
        if not len(breaks):
            break
    least = min(cost for cost, _ in choices)
    return next(gap for cost, gap in choices if cost <= CLEARLY * least)


def loads(
    file: FlashFile, positions: np.ndarray, record_bytes: int, costs: Costs, tile_bytes: int, most: int
) -> list[Load]:
    """Divide records of `record_bytes` at ascending file `positions` (int64 [n]) among tiles, `most` in each.

    Every tile holds at least one record, whatever its size: the caller's has room for one, and for its sectors.
    """
    if not len(positions):
        return []
    starts, lengths = read_range(file, positions, record_bytes)
    ends = starts + lengths
    fresh = np.append(True, starts[1:] - ends[:-1] > best_gap(costs, starts, ends))
    added = np.where(fresh, lengths + ALIGN, ends - np.append(0, ends[:-1]))  # ALIGN at most is lost at each begin
    return [
        _load(file, positions[a:b], record_bytes, fresh[a:b], a)
        for a, b in _cuts(np.cumsum(added), lengths, tile_bytes, most)
    ]


def _cuts(total: np.ndarray, lengths: np.ndarray, tile_bytes: int, most: int) -> Iterator[tuple[int, int]]:
    """Stretches of records whose bytes fit a tile. total: running sum of what each record adds."""
    first, n = 0, len(total)
    while first < n:
        # The first one of a tile begins a request, whatever lies before it.
        room = total[first] + tile_bytes - lengths[first] - ALIGN
        last = min(int(np.searchsorted(total, room, side="right")), first + most)
        yield first, max(last, first + 1)
        first = max(last, first + 1)


def _load(file: FlashFile, positions: np.ndarray, record_bytes: int, fresh: np.ndarray, first: int) -> Load:
    """One tile's. fresh: bool [n], the records with which a request begins; the first one does in any case."""
    fresh = fresh.copy()
    fresh[0] = True
    begins = np.flatnonzero(fresh)
    ends = np.append(begins[1:], len(positions)) - 1
    whole = positions[ends] + record_bytes - positions[begins]
    starts, lengths = read_range(file, positions[begins], whole)
    places = np.cumsum(np.append(0, -(-lengths[:-1] // ALIGN) * ALIGN))
    of = np.cumsum(fresh) - 1
    offsets = places[of] + positions - starts[of]
    needs = positions[begins] - starts + whole
    return Load(first, first + len(positions), offsets, *_pieces(starts, lengths, needs, places))


def _pieces(
    starts: np.ndarray, lengths: np.ndarray, needs: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same requests, none longer than SPLIT."""
    counts = -(-lengths // SPLIT)
    of = np.repeat(np.arange(len(starts)), counts)
    cut = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * SPLIT
    sizes = np.minimum(lengths[of] - cut, SPLIT)
    return starts[of] + cut, sizes, np.clip(needs[of] - cut, 0, sizes), places[of] + cut
