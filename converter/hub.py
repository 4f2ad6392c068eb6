"""Repository ids: from `SRC` to a local directory, through huggingface_hub. Nothing but data files is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flashsparse.errors import SourceUnavailableError, UsageError

ALLOW = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
IGNORE = ["*/*", "consolidated*.safetensors"]  # sub-folders hold other formats; consolidated.* is a second copy
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_repository_id(text: str) -> bool:
    """Whether `text` has the form OWNER/NAME."""
    return _REPOSITORY.fullmatch(text) is not None


def find_source(src: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint: `src` itself, or where the repository of that id was downloaded to.

    Raises UsageError when `src` is neither, SourceUnavailableError when the repository cannot be had.
    """
    path = Path(os.path.expanduser(os.fspath(src)))
    if os.fspath(src) and os.path.exists(path):  # False, not an error, for a path that no file can have
        return path
    if isinstance(src, str) and is_repository_id(src):
        return _download(src)
    shown = repr(os.fspath(src)) if "\0" in os.fspath(src) or not os.fspath(src) else src
    raise UsageError(f"{shown}: no such directory, and not a repository id (OWNER/NAME)")


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as problem:
        raise SourceUnavailableError(f"{repository}: huggingface_hub is not installed ({problem})") from problem
    try:
        path = Path(snapshot_download(repository, allow_patterns=ALLOW, ignore_patterns=IGNORE))
    except Exception as problem:  # huggingface_hub, requests and httpx each have their own families of errors
        raise SourceUnavailableError(
            f"{repository}: no such directory, and the repository cannot be downloaded or found in the local cache "
            f"({_one_line(problem)})"
        ) from problem
    if not any(path.glob("*.safetensors")):
        raise SourceUnavailableError(f"{repository}: the repository has no safetensors; pickles are not downloaded")
    return path


def _one_line(problem: Exception) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 200 else text[:200] + "..."
