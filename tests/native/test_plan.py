"""The read plan: every record arrives whole where it was sent, whatever the requests are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashsparse.flash import FlashFile, ReadPool, reads, slot_stride
from tests.native.test_reader import Memory

RECORDS, OFFSET = 400, 16384


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, OFFSET + RECORDS * 6976).astype(np.uint8)


@pytest.fixture
def path(tmp_path: Path, content: np.ndarray) -> Path:
    (tmp_path / "flash-000.safetensors").write_bytes(content.tobytes())
    return tmp_path / "flash-000.safetensors"


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("stride", [64, 832, 4096, 6976])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_every_record_arrives(path: Path, content: np.ndarray, mode: str, stride: int, share: float) -> None:
    rng = np.random.default_rng(2)
    ids = np.flatnonzero(rng.random(RECORDS) < share).astype(np.int64)
    size = stride - 3  # the record ends before its stride does
    with FlashFile(path, mode) as file, ReadPool(4) as pool:
        slot = slot_stride(stride, OFFSET, file.sector, file.direct)
        slots = rng.permutation(RECORDS)[: len(ids)].astype(np.int64)
        memory = Memory(RECORDS * slot)
        plan = reads(file, OFFSET + ids * stride, size, memory.address + slots * slot)
        assert plan.requests <= len(ids)
        with plan.submit(pool) as batch:
            taken = []
            while len(done := batch.take()):
                for index in done:
                    at = slots[index] * slot + plan.begins[index]
                    position = OFFSET + ids[index] * stride
                    assert np.array_equal(memory.bytes[at : at + size], content[position : position + size])
                taken.extend(done.tolist())
        assert sorted(taken) == list(range(len(ids)))
        assert pool.counters.reads == plan.requests
        assert pool.counters.read_bytes <= plan.nbytes
