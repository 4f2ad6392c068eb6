"""Text files for calibration and evaluation: their digests and their contents.

A predictor must not be judged on the text that it was calibrated on, so that packs carry the digest of that text.
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


def texts_sha256(paths: Sequence[PathLike]) -> str:
    """One digest for some files, whatever their order: the SHA-256 over their sorted digests, joined by newlines."""
    return hashlib.sha256("\n".join(sorted(map(file_sha256, paths))).encode()).hexdigest()


def refuse_same_text(paths: Sequence[PathLike], calibrated_on: str | None) -> None:
    """Raises UsageError when the files, or one of them, are what `calibrated_on` (a digest of either kind) names."""
    for some in ([path] for path in paths):
        if calibrated_on in (file_sha256(some[0]), texts_sha256(some)):
            raise UsageError(f"{some[0]}: the pack was calibrated on this text; give a text that it has not seen")
    if calibrated_on == texts_sha256(paths):
        raise UsageError(f"{paths[0]} and the others: the pack was calibrated on them; give a text it has not seen")


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
