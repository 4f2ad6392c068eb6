"""`flashsparse chat`: a conversation in the terminal.

Owns the prompt, the slash commands and interrupts. What is fed and generated is conversation.py's and the session's.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashsparse.arguments import shown
from flashsparse.cli import STDOUT
from flashsparse.cli.conversation import Conversation
from flashsparse.cli.options import Sampling, memory_options, open_engine, sampling_options, split
from flashsparse.cli.packs import resolve_pack, state_dir
from flashsparse.cli.report import full_note, printable, quality_report, stats_line, write
from flashsparse.errors import FlashSparseError, UsageError

if TYPE_CHECKING:
    from flashsparse import Engine

HELP = '''/clear            forget the conversation
/save FILE        write the conversation to a file
/load FILE        continue a conversation from a file
/stats            figures of the last reply
/set NAME VALUE   change temp, top-p, top-k, seed, max-tokens or system
/show             settings, memory plan and length of the conversation
/help             this list
/bye              leave (also Ctrl-D)
"""               begin and end a message of several lines
Ctrl-C            stop the reply'''
_NUMBERS = {"temp": float, "top-p": float, "top-k": int, "seed": int, "max-tokens": int}


@click.command()
@click.argument("pack")
@click.option("--system-prompt", help="Instructions that precede the conversation; needs a chat template.")
@sampling_options(temp=0.7, max_tokens=512)
@memory_options()
@click.option("--stats", is_flag=True, help="Print the pack's quality, and the figures after each reply.")
@click.option("-y", "--yes", is_flag=True, help="Convert a checkpoint into the cache directory without asking.")
def chat(pack: str, system_prompt: str | None, stats: bool, yes: bool, **values: Any) -> None:
    """Chat with a pack.

    PACK is a pack, or a checkpoint directory or repository id, which is converted once into the cache directory.
    Without a chat template the model continues the text as it stands. /help lists the commands inside.
    """
    memory, sampling = split(values)
    with open_engine(resolve_pack(pack, yes), memory) as engine:
        if stats:
            _show_quality(engine)
        talk(engine, sampling, system_prompt, stats)


def _show_quality(engine: Engine) -> None:
    from flashsparse.quality.record import read_quality

    manifest = engine.manifest
    for line in quality_report(manifest.tier, *read_quality(manifest.path, manifest.digest)):
        click.echo(line, err=True)


def talk(engine: Engine, sampling: Sampling, system: str | None = None, stats: bool = False) -> None:
    """Read, answer, repeat, until /bye or the end of the input."""
    with engine.session() as session, _history():
        conversation = Conversation(engine, session)
        chat_loop = Chat(conversation, sampling, stats)
        if system is not None:
            chat_loop.set("system", system)
        chat_loop.run()


class Chat:
    """The loop and its slash commands."""

    def __init__(self, conversation: Conversation, sampling: Sampling, stats: bool) -> None:
        self.conversation, self.sampling, self.always_stats = conversation, sampling, stats
        self.last_stats: dict[str, Any] | None = None

    def run(self) -> None:
        if sys.stdin.isatty():
            click.echo("/help lists the commands, Ctrl-D leaves.", err=True)
        while (text := read_message()) is not None:
            if not text.strip():
                continue
            if text.strip() == "/bye":
                return
            try:
                self.command(text.strip()) if text.startswith("/") else self.answer(text)
            except KeyboardInterrupt:
                click.echo("(stopped)", err=True)
            except Exception as error:  # the conversation is still there, unless the engine had to close
                if isinstance(error, BrokenPipeError) or getattr(error, "filename", None) == STDOUT:
                    raise  # nobody can read the replies
                if self.conversation.session.closed:
                    raise
                click.echo(f"flashsparse: {_one_line(error)}", err=True)

    def answer(self, text: str) -> None:
        """Stream one reply. The first Ctrl-C ends it after the current token, a second one at once."""
        ids_only = self.conversation.engine.tokenizer is None
        pieces, reason = self.conversation.reply(text, self.sampling), None
        with contextlib.closing(pieces), interrupt_flag() as interrupted:  # type: ignore[type-var]
            try:
                for piece in pieces:
                    write(f"{piece.token} " if ids_only else piece.text)
                    self.last_stats, reason = piece.stats.to_dict(), piece.finish_reason
                    if interrupted:
                        break
            except KeyboardInterrupt:
                interrupted.append(True)
            finally:
                write("\n")
        if interrupted:
            click.echo("(stopped)", err=True)
        elif reason == "length" and self.conversation.session.full:
            click.echo(full_note(self.conversation.session), err=True)
        if self.always_stats and self.last_stats:
            click.echo(stats_line(self.last_stats), err=True)
            self._warn_of_drift()

    def _warn_of_drift(self) -> None:
        """Say so when the predictor names far more or fewer neurons than on its calibration text."""
        drift = self.conversation.engine.drift()
        if drift is not None and drift.warning is not None:
            click.echo(drift.warning, err=True)

    def command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        handler = getattr(self, f"do_{name}", None)
        if handler is None:
            raise UsageError(f"/{name} is not a command; /help lists them")
        handler(rest.strip())

    def do_help(self, _: str) -> None:
        click.echo(HELP)

    def do_clear(self, _: str) -> None:
        self.conversation.clear()

    def do_save(self, name: str) -> None:
        self.conversation.save(_file(name, "/save"))

    def do_load(self, name: str) -> None:
        self.conversation.load(_file(name, "/load"))

    def do_stats(self, _: str) -> None:
        click.echo(stats_line(self.last_stats) if self.last_stats else "no reply yet")
        self._warn_of_drift()

    def do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        self.set(name, value.strip())

    def set(self, name: str, value: str) -> None:
        """Change one setting. Raises UsageError for an unknown name or a value it cannot take."""
        if name == "system":
            if not self.conversation.templated:
                raise UsageError("the model has no chat template, so it takes no system prompt")
            self.conversation.system = value or None
            return
        if name not in _NUMBERS:
            raise UsageError(f"{name!r} is not a setting; expected system or {', '.join(_NUMBERS)}")
        from flashsparse.sampling import check_sampling

        number: Any
        try:
            number = None if name == "seed" and value in ("", "none") else _NUMBERS[name](value)
        except ValueError:
            raise UsageError(f"{name} takes a number, found {shown(value)}") from None
        change = {name.replace("-", "_"): number}
        check_sampling(**vars(replace(Sampling(), **change)))  # the other settings may be the command line's mistake
        self.sampling = replace(self.sampling, **change)

    def do_show(self, _: str) -> None:
        for name, value in vars(self.sampling).items():
            click.echo(f"{name.replace('_', '-')}: {value}")
        click.echo(f"system: {self.conversation.system}")
        click.echo(f"conversation: {len(self.conversation.session.tokens)} tokens")
        click.echo(self.conversation.engine.plan.describe())


def _file(name: str, command: str) -> Path:
    if not name:
        raise UsageError(f"{command} needs a file name")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~ and a user that does not exist
        raise UsageError(f"{command} {name}: {error}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, FlashSparseError | OSError) else f"{type(error).__name__}: {text}"


def read_message() -> str | None:
    """The next message, None at the end of the input. Ctrl-C drops what was typed."""
    while True:
        try:
            return printable(_read_lines())
        except EOFError:
            if sys.stdin.isatty():
                click.echo()
            return None
        except KeyboardInterrupt:
            click.echo()


def _read_lines() -> str:
    tty = sys.stdin.isatty()
    line = input(">>> " if tty else "")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while len(lines[-1]) < 3 or not lines[-1].endswith('"""'):
        lines.append(input("... " if tty else ""))
    lines[-1] = lines[-1][:-3]
    return "\n".join(lines).strip("\n")


@contextlib.contextmanager
def interrupt_flag() -> Iterator[list[bool]]:
    """A list that the first Ctrl-C makes non-empty; a second one raises KeyboardInterrupt."""
    pressed: list[bool] = []

    def handle(*_: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing with a history of its own, kept between chats; only where there is a terminal and readline."""
    try:
        import readline
    except ImportError:
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    path = state_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
