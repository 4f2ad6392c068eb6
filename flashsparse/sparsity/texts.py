"""Text files for calibration and evaluation: their digests and their contents.

A predictor must not be judged on texts that it was calibrated on, so that packs carry the digests of those texts.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from flashsparse.errors import UsageError

PathLike = str | os.PathLike[str]
PACKED_BYTES = 2048  # decompressed at once: a zstandard block of 4 bytes may stand for 128 KiB


def file_sha256(path: PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises UsageError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def text_digests(paths: Sequence[PathLike]) -> tuple[str, ...]:
    """The SHA-256 digests of some files, in ascending order, whatever the order of the files.

    Raises UsageError for a text that is given twice, under whatever name, and for a file that cannot be read.
    """
    found: dict[str, PathLike] = {}
    for path in paths:
        digest = file_sha256(path)
        if digest in found:
            raise UsageError(f"{path}: the same text as {found[digest]}, expected each text once; leave one out")
        found[digest] = path
    return tuple(sorted(found))


def refuse_same_text(paths: Sequence[PathLike], calibrated_on: Sequence[str]) -> None:
    """Raises UsageError naming the first file whose SHA-256 digest is among `calibrated_on`."""
    for path in paths:
        if file_sha256(path) in calibrated_on:
            raise UsageError(f"{path}: the pack was calibrated on this text; give a text that it has not seen")


def read_texts(paths: Sequence[PathLike], characters: int | None = None) -> str:
    """The files' UTF-8 text (.zst: decompressed), one after the other, at most `characters` of it.

    Raises UsageError for a file that cannot be read or is not UTF-8, and when there is no text at all.
    """
    parts: list[str] = []
    left = None if characters is None else min(characters, sys.maxsize)  # what a file can be asked for
    for path in paths:
        try:
            with open_text(path) as file:
                parts.append(file.read(-1 if left is None else left))
        except OSError as error:
            raise _unreadable(path, error) from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text ({error.reason})") from error
        left = left and left - len(parts[-1])
        if left == 0:
            break
    text = "".join(parts)
    if not text:
        raise UsageError(f"{', '.join(str(Path(path)) for path in paths)}: no text, expected at least one character")
    return text


@contextmanager
def open_text(path: PathLike) -> Iterator[TextIO]:
    """A UTF-8 text, decompressed when its name ends in .zst. Newlines stay as they are.

    Reading raises OSError, UnicodeDecodeError, and UsageError for a file that is not whole zstandard frames.
    """
    with open(path, "rb") as raw:
        if Path(path).suffix != ".zst":
            yield io.TextIOWrapper(raw, encoding="utf-8", newline="")
            return
        import zstandard

        try:
            plain = io.BufferedReader(_Unpacked(path, raw, zstandard.ZstdDecompressor))
            yield io.TextIOWrapper(plain, encoding="utf-8", newline="")
        except zstandard.ZstdError as problem:
            raise UsageError(f"{path}: not zstandard data ({problem})") from problem


class _Unpacked(io.RawIOBase):
    """The bytes of all zstandard frames of a file. Raises UsageError where the file ends within one."""

    def __init__(self, path: PathLike, raw: BinaryIO, decompressor: Callable[[], Any]) -> None:
        self._path, self._raw, self._decompressor = path, raw, decompressor
        self._frame: Any = None  # the one that has begun and not ended
        self._packed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._raw.read(PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise UsageError(
                        f"{self._path}: ends within a zstandard frame (cut short?), expected the whole file"
                    )
                return 0
            self._unpack()
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _unpack(self) -> None:
        frame = self._frame or self._decompressor().decompressobj()
        self._plain = frame.decompress(self._packed)
        self._frame, self._packed = (None, frame.unused_data) if frame.eof else (frame, b"")


def _unreadable(path: PathLike, error: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be read: {error.strerror or error}")
