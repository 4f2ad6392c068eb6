"""Durable writing: whole writes, syncing of files and directories, swapping of directories. Knows nothing of packs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

from flashsparse.pack.layout import FileDigest, FileEntry

READ_BYTES = 4 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux's RENAME_EXCHANGE and Darwin's RENAME_SWAP have the same value
FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Writes every byte at the file's position; raises OSError."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def sync_file(fd: int) -> None:
    """Flushes a file to the medium: F_FULLFSYNC where there is one (macOS), as its fsync leaves the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
            return
        except OSError:  # not every filesystem has it
            pass
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Makes renames, new and removed names in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        sync_file(fd)
    finally:
        os.close(fd)


class OutputFile:
    """A new file of a pack. Write in order, or by offset; `finish` syncs it and returns its manifest entry."""

    def __init__(self, path: Path, digest: FileDigest) -> None:
        self.path, self.digest = path, digest
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        write_all(self._fd, data)
        self.digest.update(data)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes without digesting; the file must then be digested with `digest_all`."""
        os.lseek(self._fd, offset, os.SEEK_SET)
        write_all(self._fd, data)

    def digest_all(self) -> None:
        """Digests the file by reading it back, for contents that were not written in order."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        while data := os.read(self._fd, READ_BYTES):
            self.digest.update(data)

    def finish(self) -> FileEntry:
        sync_file(self._fd)
        return self.digest.entry()


def swap(new: Path, old: Path) -> bool:
    """Exchanges two directories in one step. False where the system or filesystem cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_name, old_name = os.fsencode(new), os.fsencode(old)
    try:
        if sys.platform == "darwin":
            return bool(libc.renamex_np(new_name, old_name, _RENAME_EXCHANGE) == 0)
        return bool(libc.renameat2(_AT_FDCWD, new_name, _AT_FDCWD, old_name, _RENAME_EXCHANGE) == 0)
    except AttributeError:
        return False


def remove_tree(path: Path) -> None:
    """Removes a directory tree or file, whatever is left of it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
