"""The read that gives the memory's rate: it must have seen every byte."""

from __future__ import annotations

import numpy as np
import pytest

from flashsparse import native


@pytest.mark.parametrize("nbytes", [0, 256, 3 << 20 | 512])
def test_reads_every_byte(nbytes: int) -> None:
    words = np.random.default_rng(0).integers(0, 2**63, nbytes // 8, np.uint64)
    with native.Workers(2) as workers:
        assert native.memory_read(workers, words) == int(np.bitwise_xor.reduce(words))


def test_refuses_a_part_of_a_block() -> None:
    with native.Workers(1) as workers, pytest.raises(ValueError, match="multiple of 256 bytes, found 264"):
        native.memory_read(workers, np.zeros(33, np.uint64))
