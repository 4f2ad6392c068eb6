"""Reading records from flash: files opened for direct or buffered reads, and a pool of threads that fills addresses.

Knows bytes, offsets and addresses only: no MLX, no models, no slots.
"""

from __future__ import annotations

from flashsparse.flash.file import FlashFile, read_range, slot_stride
from flashsparse.flash.plan import Merging, Reads, reads
from flashsparse.flash.reader import Batch, Counters, Landed, ReadPool
from flashsparse.flash.stream import TYPICAL, Costs, Load, loads

__all__ = [
    "TYPICAL", "Batch", "Costs", "Counters", "FlashFile", "Landed", "Load", "Merging", "ReadPool", "Reads", "loads",
    "read_range", "reads", "slot_stride",
]  # fmt: skip
