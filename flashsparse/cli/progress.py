"""Progress of walks over a text and of files being written: a bar on a terminal, lines otherwise, on standard error.

Owns how it looks; what is counted is the caller's. The last line of something that was finished says 100 %.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Progress = Callable[[str, int, int], None]  # (what, done, of how many)


@contextmanager
def walk_progress(part: Callable[[str], str] = str) -> Iterator[Progress]:
    """A bar on a terminal, otherwise a line whenever `part` of what is done changes; both with the time left."""
    if not sys.stderr.isatty():
        yield Lines(part)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Bar(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the text", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show


class Lines:
    """Progress as plain lines: one when `part` of what is done changes, and one at the end."""

    def __init__(self, part: Callable[[str], str] = str) -> None:
        self._part = part
        self._said: tuple[str, bool] | None = None
        self._began, self._first = 0.0, 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._said is None:
            self._began, self._first = now, done
        saying = self._part(what), done >= total
        if saying != self._said:
            self._said = saying
            click.echo(f"{percent_done(done, total)}  {saying[0]}{self._left(now, done, total)}", err=True)

    def _left(self, now: float, done: int, total: int) -> str:
        """The time left at the pace since the first report, which is not of the whole when a run was resumed."""
        if done == self._first or done >= total:
            return ""
        seconds = round((now - self._began) * (total - done) / (done - self._first))
        minutes, rest = divmod(seconds, 60)
        return f", about {minutes} min {rest:02} s left" if minutes else f", about {rest} s left"


def percent_done(done: int, total: int) -> str:
    """`  7%`; 100 only when all is done."""
    return f"{100 * done // total:3}%"
