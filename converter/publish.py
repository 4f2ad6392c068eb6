"""The staging directory of a conversion and how a finished pack takes its place.

`.NAME.partial` beside the destination holds `lock`, `journal.jsonl`, `pack/`, and `calibration/` for tier predict.
Readers of the destination see the old pack or the new one: directories are exchanged in one step, or renamed one after
the other where that is impossible.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from converter.disk import remove_tree, swap, sync_directory
from flashsparse.errors import ConvertError, UsageError, format_bytes
from flashsparse.pack.manifest import MANIFEST

ATTEMPTS = 1000  # to take a lock that others are just removing
MAX_NAME_BYTES = 255  # of a file name, on every common filesystem


def staging_path(dst: Path) -> Path:
    """The staging directory of `dst`. Raises UsageError when its name would be too long."""
    path = dst.parent / f".{dst.name}.partial"
    surplus = len(os.fsencode(path.name)) - MAX_NAME_BYTES
    if surplus > 0:
        most = len(os.fsencode(dst.name)) - surplus
        raise UsageError(
            f"{dst.parent}/{dst.name[:20]}...: found a name of {most + surplus} bytes, expected at most {most}"
        )
    return path


class Staging:
    """The locked staging directory beside `dst`. Use as a context manager; it is kept while
    there is work in it."""

    def __init__(self, dst: Path) -> None:
        self.dst = dst
        self.path = staging_path(dst)
        self.pack = self.path / "pack"
        self.journal = self.path / "journal.jsonl"
        self.calibration = self.path / "calibration"
        self._lock = -1

    def __enter__(self) -> Staging:
        self.dst.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(ATTEMPTS):
            self._acquire()
            if self._lock >= 0:
                return self
        raise ConvertError(f"{self.path}: cannot be made; name a destination on another file system")

    def __exit__(self, *exc: object) -> None:
        if not self.used:
            self.remove()
        os.close(self._lock)

    def _acquire(self) -> None:
        """Takes the lock; it counts only while the directory is still the one at this path."""
        lock = self.path / "lock"
        try:
            self.path.mkdir(exist_ok=True)
            fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another conversion just finished and removed it
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                self._lock, fd = fd, -1
        except FileNotFoundError:
            pass
        except BlockingIOError:
            raise ConvertError(f"{self.dst}: another conversion to this destination is running") from None
        finally:
            if fd >= 0:
                os.close(fd)

    @property
    def used(self) -> bool:
        """Whether an earlier conversion left work here."""
        return self.journal.exists() or self.pack.exists()

    def clear(self) -> None:
        """Removes the work of an earlier conversion; the journal goes first, so that nothing half gone is resumed."""
        self.journal.unlink(missing_ok=True)
        for name in ("pack", "old", "calibration"):
            remove_tree(self.path / name)

    def start(self) -> None:
        """Makes the empty pack directory."""
        self.clear()
        self.pack.mkdir()
        sync_directory(self.path)
        sync_directory(self.dst.parent)

    def publish(self) -> None:
        """Moves the finished pack to the destination and makes that durable. The old one goes with the staging."""
        sync_directory(self.pack)
        if not os.path.lexists(self.dst):
            os.rename(self.pack, self.dst)
        elif not swap(self.pack, self.dst):
            os.rename(self.dst, self.path / "old")
            os.rename(self.pack, self.dst)
        sync_directory(self.dst.parent)
        sync_directory(self.path)

    def remove(self) -> None:
        """Removes the staging directory; the lock file last, as it guards the rest."""
        self.clear()
        (self.path / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: a conversion that starts just now is using it
            self.path.rmdir()
        sync_directory(self.dst.parent)


def check_outside(dst: Path) -> None:
    """A pack's directory is its own. Raises ConvertError for a destination that lies in another pack."""
    for parent in Path(os.path.realpath(dst)).parents:
        if os.path.isfile(parent / MANIFEST):
            raise ConvertError(f"{dst}: lies inside the pack {parent}: name a destination outside of it")


def check_replaceable(dst: Path) -> None:
    """Only a pack may be replaced. Raises ConvertError for any other file or directory, and one with a pack in it."""
    if dst.is_dir() and not dst.is_symlink() and ((dst / MANIFEST).is_file() or not any(dst.iterdir())):
        for inner in sorted(dst.glob(f"*/{MANIFEST}")):
            raise ConvertError(f"{dst}: holds another pack, {inner.parent.name}, which would go too: move it elsewhere")
        return
    raise ConvertError(f"{dst}: exists and is not a pack; --force replaces only packs, so remove it yourself")


def check_space(directory: Path, needed: int) -> None:
    """Raises ConvertError when the filesystem has less than `needed` bytes left."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ConvertError(
            f"{directory}: not enough space: found {format_bytes(free)} free, expected {format_bytes(needed)}; "
            "free some, or write to another disk"
        )
