"""The command `flashsparse`: its subcommands by name, and how errors reach the user.

Owns dispatch and exit codes: 0, 1 for run errors, 2 for usage errors, 130 for an interrupt; one line each on standard
error. A command's module is imported only when that command runs; the commands themselves live one per file.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

# name -> (module that defines a click command of that name, short help)
COMMANDS = {
    "convert": ("flashsparse.cli.convert", "Convert a checkpoint to a pack."),
    "calibrate": ("flashsparse.cli.calibrate", "Measure which neurons fire on a text."),
    "chat": ("flashsparse.cli.chat", "Chat with a pack."),
    "generate": ("flashsparse.cli.generate", "Continue a prompt, once."),
    "eval": ("flashsparse.cli.eval", "Measure what a pack loses against the dense model."),
    "sparsity": ("flashsparse.cli.sparsity", "Measure how many neurons a model needs."),
    "info": ("flashsparse.cli.info", "Show what a pack holds."),
    "verify": ("flashsparse.cli.verify", "Check every checksum of a pack."),
    "doctor": ("flashsparse.cli.doctor", "Measure the drive, and say what speed to expect."),
    "selftest": ("flashsparse.cli.selftest", "Test every kernel on this machine, and print a report."),
    "demo": ("flashsparse.cli.demo", "Stream the embedded model under a small budget."),
}

# what to do about the system's own errors
REMEDIES = {
    errno.ENOSPC: "; free some, or write to another disk",
    errno.EDQUOT: "; free some, or write to another disk",
    errno.EACCES: "; change its permissions, or name another path",
    errno.EROFS: "; name a path on another file system",
    errno.EEXIST: "; a file is in the way: name another path",
    errno.ENOTDIR: "; a file is in the way: name another path",
}
STDOUT = "standard output"


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for; `--help` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[name][0]), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import flashsparse

        click.echo(f"flashsparse {flashsparse.__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it.")
@click.option("--debug", is_flag=True, hidden=True, expose_value=False, help="Show tracebacks.")
def cli() -> None:
    """Run language models larger than the memory they may use: weights stay on flash, a token reads what it needs."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line. Never returns: exits with the command's status."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # text the terminal cannot show becomes "?", never an error
            stream.reconfigure(errors="replace")
    sys.exit(_run(args))


def _run(args: list[str]) -> int:
    try:
        status = cli.main(args, prog_name="flashsparse", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away (`| head`): say nothing
        _drop_stdout()
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except Exception as error:
        if "--debug" in args:
            traceback.print_exc()
        message, status = explain(_naming_stdout(error))
        click.echo(f"flashsparse: {' '.join(message.split())}", err=True)
    return status if isinstance(status, int) else 0


def _drop_stdout() -> None:
    """Let the interpreter's last flush find somewhere to write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _naming_stdout(error: Exception) -> Exception:
    """The error, or one that names standard output when that is what cannot be written."""
    if isinstance(error, OSError) and error.filename in (None, STDOUT):
        try:
            sys.stdout.flush()  # what could not be written is still waiting
        except OSError as again:
            _drop_stdout()
            return OSError(again.errno, again.strerror, STDOUT)
    return error


def explain(error: BaseException) -> tuple[str, int]:
    """One line for the user and the exit status: 2 for usage errors, 1 for all others."""
    from flashsparse.errors import FlashSparseError, UsageError

    if isinstance(error, click.ClickException):
        return _click_message(error), error.exit_code
    if isinstance(error, FlashSparseError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return what + REMEDIES.get(error.errno or 0, ""), 1
    if isinstance(error, MemoryError):
        return "out of memory; give a smaller --dram", 1
    return f"internal error: {type(error).__name__}: {error} (flashsparse --debug shows where)", 1


def _click_message(error: click.ClickException) -> str:
    context: Any = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return error.format_message() + hint
