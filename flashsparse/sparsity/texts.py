"""Text files for calibration and evaluation: their digests and their contents.

A predictor must not be judged on texts that it was calibrated on, so that packs carry the digests of those texts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from flashsparse.errors import UsageError

PathLike = str | os.PathLike[str]


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
    """The files' UTF-8 text, one after the other, at most `characters` of it.

    Raises UsageError for a file that cannot be read or is not UTF-8, and when there is no text at all.
    """
    parts: list[str] = []
    left = characters
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as file:
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


def _unreadable(path: PathLike, error: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be read: {error.strerror or error}")
