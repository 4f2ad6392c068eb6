"""Resident weights on their way into memory, in the order in which a first prompt needs them.

The first layers compute while the weights of later ones are read; a prompt's records come before those, since the layer
that is computed waits for them. Owns the order, the reads and who waits for which. Where bytes lie is `weights.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from mmap import PAGESIZE
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.errors import FlashReadError
from flashsparse.macos import announce, here

if TYPE_CHECKING:
    from flashsparse.flash import Batch, ReadPool
    from flashsparse.pack.safetensors import TensorInfo
    from flashsparse.weights import ResidentStore

FIRST = 0  # the stage of what building a model copies, and of what comes before its layers; layer n's is 1 + n
LAST = {"lm_head.weight", "lm_head.scales", "lm_head.biases"}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def stage_of(info: TensorInfo, layers: int) -> int:
    """When a model of that many layers first needs a tensor: FIRST, 1 + its layer, or 1 + layers."""
    layer = _LAYER.search(info.name)
    if len(info.shape) == 1:  # small, and copied as float32 when the model is built
        return FIRST
    if layer is not None:
        return 1 + int(layer[1])
    return 1 + layers if info.name in LAST or ".project_out." in info.name else FIRST


class Loading:
    """Begins to read all that `stores` hold for a model of `layers` layers. One thread at a time waits.

    `failed`: whether reading is known to have failed; what should have come is not there then.
    """

    def __init__(self, pool: ReadPool, stores: Sequence[ResidentStore], layers: int) -> None:
        self.failed = self._released = False
        self._pool, self._stores = pool, stores  # kept: their memory must live while anything is read into it
        self._last, self._there = 1 + layers, -1
        self._batches: dict[int, Batch] = {}
        for store in stores:
            if here() and not store.file.direct:
                for offset, nbytes in store.stretches:
                    announce(store.file.fd, offset, nbytes)
        pieces = [store.pieces(lambda info: stage_of(info, layers)) for store in stores]
        files = np.repeat(np.arange(len(stores)), [len(some) for some in pieces])
        every = np.concatenate(pieces)
        order = np.argsort(every["stage"], kind="stable")
        every, files = every[order], files[order]
        # Memory that is taken when so many reads have begun.
        self._taken = np.concatenate(([0], np.cumsum(-(-every["length"] // PAGESIZE) * PAGESIZE)))
        try:
            for at in np.unique(every["stage"]):
                self._begin(int(at), every[every["stage"] == at], files[every["stage"] == at])
        except BaseException:
            self.release()
            raise

    def _begin(self, at: int, reads: np.ndarray, files: np.ndarray) -> None:
        each = [self._stores[index].file for index in files]
        places = reads["offset"], reads["length"], reads["need"], reads["dest"]
        self._batches[at] = self._pool.submit(each, *places, later=True)

    @property
    def over(self) -> bool:
        """Whether every byte is known to be there."""
        return self._there >= self._last

    def wait(self, stage: int | None = None) -> None:
        """Until everything of that stage (None: all) and of those before it is there. Raises FlashReadError.

        And ValueError after `release`, for what was dropped.
        """
        until = self._last if stage is None else min(stage, self._last)
        while self._there < until:
            batch = self._batches.get(self._there + 1)
            if batch is None and self._released:
                raise ValueError("these weights were dropped before they came")
            if batch is not None:
                with self._failing():
                    batch.wait()
                self._batches.pop(self._there + 1).release()
            self._there += 1

    @contextmanager
    def still(self) -> Iterator[int]:
        """Begin no reads meanwhile; gives the bytes of memory that they have taken. Raises FlashReadError."""
        try:
            waiting = self._pool.pause()
            with self._failing():
                for batch in self._batches.values():
                    batch.check()
            unified = sum(store.nbytes for store in self._stores if store.unified)
            yield unified or int(self._taken[-1 - waiting])  # MLX's memory is taken when it is made
        finally:
            self._pool.resume()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except FlashReadError:
            self.failed = True
            raise

    def release(self) -> None:
        """Drop the reads that have not begun and wait for those in flight. Idempotent; what is there stays."""
        self._released = True
        while self._batches:
            at = next(reversed(self._batches))  # the last first: none of them begins meanwhile
            self._batches[at].release()
            del self._batches[at]

    def __del__(self) -> None:
        if hasattr(self, "_batches"):
            self.release()
