"""Where packs come from: a pack as it is, or a checkpoint converted once into the user's cache directory.

Owns the cache directory and its locking. The conversion itself is the converter's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from flashsparse.errors import PackError, UsageError
from flashsparse.places import cache_dir


def state_dir() -> Path:
    """$XDG_STATE_HOME/flashsparse, else the cache directory on macOS, else ~/.local/state/flashsparse."""
    base = os.environ.get("XDG_STATE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "flashsparse"
    return cache_dir() if sys.platform == "darwin" else Path.home() / ".local/state/flashsparse"


def resolve_pack(source: str, yes: bool) -> Path:
    """The pack that `source` names: a pack directory, or a checkpoint directory or repository id converted once.

    Without a terminal and without `yes` a checkpoint that is not converted yet is a UsageError.
    """
    path = Path(source).expanduser()
    if (path / "pack.json").is_file():
        return path
    if not (path / "config.json").is_file() and (path.exists() or not is_repo_id(source)):
        found = "has neither pack.json nor config.json" if path.is_dir() else "is not a directory"
        raise UsageError(f"{source}: {found}; expected a pack, a checkpoint directory or a repository id")
    target = cache_dir() / "packs" / cache_name(source, path)
    if not is_pack(target):
        _agree(source, target, yes)
    return convert_once(path if path.is_dir() else source, target)


def is_repo_id(text: str) -> bool:
    """Whether `text` reads as owner/name on the Hugging Face hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None


def cache_name(source: str, path: Path) -> str:
    """A directory name of its own for this checkpoint in its present state and for this version of FlashSparse."""
    facts = [_version(), source]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file())
        facts[1:] = [str(path.resolve()), *(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)]
    name = re.sub(r"[^\w.-]+", "-", path.resolve().name if path.is_dir() else source)
    return f"{name}-{hashlib.sha256(os.fsencode(chr(10).join(facts))).hexdigest()[:12]}"


def _version() -> str:
    import flashsparse

    return flashsparse.__version__


def is_pack(path: Path) -> bool:
    """Whether `path` holds a pack that this version reads."""
    from flashsparse.pack.manifest import Manifest

    if not (path / "pack.json").is_file():
        return False
    try:
        Manifest.load(path)
    except PackError:
        return False
    return True


def _agree(source: str, target: Path, yes: bool) -> None:
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            f"{source} is a checkpoint, not a pack: convert it with `flashsparse convert {source} DST`, "
            f"or pass --yes to convert it once into {target}"
        )
    question = f"{source} is a checkpoint, not a pack. Convert it once into {target}?"
    if not click.confirm(question, default=True, err=True):
        raise click.Abort()


def convert_once(source: Path | str, target: Path) -> Path:
    """Convert into `target` unless it is there already; an interrupted run continues, concurrent ones wait."""
    if is_pack(target):
        return target
    from converter.convert import convert

    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f"{target.name}.lock")):
        if not is_pack(target):
            click.echo(f"converting {source} into {target}", err=True)
            convert(source, target, resume=not target.exists(), force=target.exists())
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock that the system drops with the process, so that a killed run leaves nothing to clean up."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
