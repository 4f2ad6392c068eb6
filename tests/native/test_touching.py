"""Pages taken ahead of use: all of them, without a change to what they hold, and no thread that outlives its owner."""

from __future__ import annotations

import mmap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import flashsparse
from flashsparse import native
from flashsparse.touching import PIECE_BYTES, Touching, for_this_system
from flashsparse.weights import Buffer
from tests.model.packs import make_pack

pytestmark = pytest.mark.skipif(not for_this_system(), reason="threads have priorities of their own on Linux only")


def in_memory(buffer: np.ndarray) -> int:
    """How many of the whole pages of `buffer` the system has given."""
    page = mmap.PAGESIZE
    first, last = -(-buffer.ctypes.data // page), (buffer.ctypes.data + buffer.nbytes) // page
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63)))


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 3 * PIECE_BYTES + 5000])
def test_every_page_is_there_and_holds_what_it_held(nbytes: int) -> None:
    memory = np.frombuffer(mmap.mmap(-1, nbytes + 8192), np.uint8)[:nbytes]
    memory[: nbytes // 2] = 7
    native.touch(memory)
    assert in_memory(memory) == nbytes // 4096
    assert (memory[: nbytes // 2] == 7).all()
    assert not memory[nbytes // 2 :].any()


def test_what_others_write_meanwhile_stays() -> None:
    buffers = [Buffer(5 * PIECE_BYTES).bytes for _ in range(4)]
    touching = Touching(buffers)
    for value, buffer in enumerate(buffers, 1):
        buffer[::512] = value
    touching.wait()
    assert [in_memory(buffer) for buffer in buffers] == [5 * PIECE_BYTES // 4096] * 4
    assert all((buffer[::512] == value).all() for value, buffer in enumerate(buffers, 1))


def test_closing_and_dropping_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    monkeypatch.setattr(native, "touch", lambda _: (begun.set(), time.sleep(0.001)))
    for end in ("close", "drop"):
        begun.clear()
        touching = Touching([np.empty(PIECE_BYTES, np.uint8)] * (1 << 16))  # more than a minute
        assert begun.wait(10)
        thread = touching._thread
        if end == "close":
            touching.close()
            touching.close()
        del touching
        thread.join(10)
        assert not thread.is_alive(), end


def test_an_engine_takes_its_slots_and_closes_the_thread(tmp_path: Path) -> None:
    path = make_pack(tmp_path, tier="exact")
    with flashsparse.load(path, slots=300) as engine:
        assert engine._touching is not None
        engine._touching.wait()
        slabs = [layer.slab.bytes for layer in engine._ffns if layer.slab is not None]
        assert slabs
        assert all(in_memory(slab) == slab.nbytes // 4096 for slab in slabs)
        del slabs
        assert engine.peak_memory() - engine.runtime_bytes <= engine.plan.budget
    assert "touching" not in names()


@pytest.mark.parametrize("dram", [None, "8MB"])
def test_a_stated_budget_s_slots_are_taken_while_loading(
    tmp_path: Path, dram: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[int]] = []

    class Told(Touching):
        def __init__(self, buffers: list[np.ndarray]) -> None:
            taken.append([buffer.ctypes.data for buffer in buffers])
            super().__init__(buffers)
            self.wait()

    monkeypatch.setattr("flashsparse.touching.Touching", Told)
    with flashsparse.load(make_pack(tmp_path, tier="exact"), dram=dram) as engine, engine.session() as session:
        session.logits(list(range(3, 40)))
        assert engine.peak_memory() - engine.runtime_bytes <= engine.plan.budget
    assert len(taken) == (1 if dram is None else 2)
    assert taken[0] == taken[-1]
    assert len(taken[0]) == engine.manifest.layers


def test_a_load_that_fails_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "touch", lambda _: time.sleep(0.01))
    monkeypatch.setattr(
        "flashsparse.loading.Loading.wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )  # as struck while reading
    with pytest.raises(KeyboardInterrupt):
        flashsparse.load(make_pack(tmp_path, tier="exact"), dram="8MB")
    assert "touching" not in names()
