"""The residual stream of all tokens between two layers: in memory, or in a work directory from which a walk resumes.

A layer's results go to a file of their own, which is synced before the journal names it and its predecessor goes. The
files are written and read, not mapped: a full disk is then an error, not a signal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from converter.disk import sync_directory, sync_file, write_all

JOURNAL = "walk.json"


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file so that it is there whole or not at all, and durable."""
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(fd, data)
        sync_file(fd)
    finally:
        os.close(fd)
    os.replace(fresh, path)
    sync_directory(path.parent)


class States:
    """The residual [T, d] of each window after `layer` layers. Windows are written in order, layer by layer."""

    def __init__(self, lengths: Sequence[int], hidden_size: int, work: Path | None = None, key: str = "") -> None:
        """`key` names what is walked: only a work directory with the same key is resumed."""
        self.lengths, self.hidden_size, self.key = list(lengths), hidden_size, key
        self.layer = -1  # -1: not even embedded
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()
        self._work = work
        self._arrays: list[np.ndarray] = []
        self._file: FileIO | None = None
        self._next = 0  # the window written next
        self._new = -1
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)

    @property
    def tokens(self) -> int:
        return int(self._starts[-1])

    def resume(self) -> bool:
        """Takes up what a walk with the same key left in the work directory, if anything."""
        assert self._work is not None
        try:
            journal = json.loads((self._work / JOURNAL).read_bytes())
            path = self._path(journal["layer"])
            if journal["key"] != self.key or path.stat().st_size != self.tokens * self.hidden_size * 4:
                return False
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        self.layer = journal["layer"]
        self._file = FileIO(path, "rb")
        return True

    def read(self, window: int) -> np.ndarray:
        """float32 [T, d] of a window, not to be written to."""
        if self._work is None:
            return self._arrays[window]
        assert self._file is not None
        out = np.empty((self.lengths[window], self.hidden_size), np.float32)
        view = out.reshape(-1).view(np.uint8).data
        self._file.seek(self._starts[window] * self.hidden_size * 4)
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                raise OSError(0, "the file ends early", str(self._path(self.layer)))
            done += got
        return out

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.read(window) for window in range(len(self.lengths)))

    def write(self, values: np.ndarray) -> None:
        """The next window's residual after the next layer; after the last window the layer counts as done."""
        if self._work is None:
            self._write_array(values)
        else:
            if self._next == 0:
                self._close_new()
                self._new = os.open(self._path(self.layer + 1), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            write_all(self._new, np.ascontiguousarray(values, np.float32).data)
        self._next += 1
        if self._next == len(self.lengths):
            self._next = 0
            self._finish()

    def _write_array(self, values: np.ndarray) -> None:
        if self.layer < 0:
            self._arrays.append(values)
        else:
            self._arrays[self._next] = values

    def _finish(self) -> None:
        if self._work is not None:
            sync_file(self._new)
            self._close_new()
            sync_directory(self._work)
            write_file(self._work / JOURNAL, json.dumps({"key": self.key, "layer": self.layer + 1}).encode())
            if self._file is not None:
                self._file.close()
            self._path(self.layer).unlink(missing_ok=True)
            self._file = FileIO(self._path(self.layer + 1), "rb")
        self.layer += 1

    def _path(self, layer: int) -> Path:
        assert self._work is not None
        return self._work / f"states-{layer}.f32"

    def _close_new(self) -> None:
        if self._new >= 0:
            os.close(self._new)
            self._new = -1

    def close(self) -> None:
        """Closes the files; they stay for a later walk."""
        self._close_new()
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Closes and removes the files."""
        self.close()
        if self._work is not None:
            (self._work / JOURNAL).unlink(missing_ok=True)
            for path in self._work.glob("states-*.f32"):
                path.unlink()
        self._arrays.clear()
