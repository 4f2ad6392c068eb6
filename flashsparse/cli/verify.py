"""`flashsparse verify`: every checksum of a pack, one line per damage."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@click.command()
@click.argument("pack", type=click.Path(exists=True, file_okay=False, path_type=Path))
def verify(pack: Path) -> None:
    """Check every byte of PACK against its checksums.

    Prints one line per damage, naming the file and the damaged records or tensors; exits 1 when there is any. Files
    that the pack does not name are ignored.
    """
    from flashsparse.memory import format_bytes
    from flashsparse.pack.manifest import read_manifest
    from flashsparse.pack.verify import verify as check

    with _progress() as progress:
        damages = check(pack, progress)
    for damage in damages:
        click.echo(str(damage))
    if damages:
        click.get_current_context().exit(1)
    files = read_manifest(pack).files
    click.echo(f"{pack}: {len(files)} files, {format_bytes(sum(e.bytes for e in files.values()))}, all checksums match")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error when that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify")
        yield lambda done, total: bar.update(task, completed=done, total=total)
