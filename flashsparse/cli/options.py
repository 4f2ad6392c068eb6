"""Options that several commands share, as one frozen value, and the loading of an engine with them.

Owns names, defaults and help of the options; what they mean is decided by flashsparse.load and Session.generate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from flashsparse import Engine

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Memory:
    """How a pack is loaded. None leaves the choice to the engine."""

    dram: str | None = None
    max_kv_size: int | None = None
    threads: int | None = None
    io_threads: int | None = None
    read_mode: str = "auto"
    lookahead: str = "auto"
    embeddings: str = "auto"
    kernels: str = "auto"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temp 0 is greedy."""

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 256


def memory_options(
    dram: str = "half of the machine, or what the model needs", max_kv_size: str = "what fits"
) -> Decorator:
    """--dram, --max-kv-size, --threads, --io-threads, --read-mode, --lookahead, --embeddings, --kernels.

    The arguments describe the defaults.
    """
    options = (
        click.option("--dram", metavar="SIZE", help=f"Memory budget: 7GB, 4GiB, 50%.  [default: {dram}]"),
        click.option(
            "--max-kv-size",
            type=click.IntRange(1),
            help=f"Tokens to reserve KV cache for.  [default: {max_kv_size}]",
        ),
        click.option("--threads", type=click.IntRange(1), help="Compute threads.  [default: one per core]"),
        click.option(
            "--io-threads",
            type=click.IntRange(1, 256),
            help="Threads that read from flash.  [default: what the drive's curve asks for (see doctor), else 16]",
        ),
        click.option(
            "--read-mode",
            type=click.Choice(["auto", "direct", "buffered"]),
            default="auto",
            help="Past or through the system's file cache; auto is direct where the file "
            "system allows it, unless the drive's curve finds buffered reads faster.",
        ),
        click.option(
            "--lookahead",
            type=click.Choice(["auto", "on", "off", "token"]),
            default="auto",
            help="Start a layer's reads under its attention; auto does while that measures faster; "
            "token (Metal) plans all layers of a token at once.",
        ),
        click.option(
            "--embeddings",
            type=click.Choice(["auto", "memory", "flash"]),
            default="auto",
            help="Where the embedding is; on flash a token reads the row it needs; auto keeps it in memory "
            "where all else fits too.",
        ),
        click.option(
            "--kernels",
            type=click.Choice(["auto", "native", "metal", "reference"]),
            default="auto",
            help="What computes: the CPU, an Apple GPU, plain MLX (slow); auto takes the GPU where there is one.",
        ),
    )
    return lambda command: _apply(options, command)


def sampling_options(temp: float, max_tokens: int) -> Decorator:
    """--temp, --top-p, --top-k, --seed and -n/--max-tokens with the command's own defaults."""
    options = (
        click.option("--temp", type=click.FloatRange(0), default=temp, help="Sampling temperature; 0 is greedy."),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            help="Sample from the likeliest tokens that add up to this.",
        ),
        click.option("--top-k", type=click.IntRange(0), default=0, help="Sample from the K likeliest; 0 is off."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option(
            "-n", "--max-tokens", type=click.IntRange(1), default=max_tokens, help="Longest reply, in tokens."
        ),
    )
    return lambda command: _apply(options, command)


def _apply(options: tuple[Decorator, ...], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def split(values: dict[str, Any]) -> tuple[Memory, Sampling]:
    """The command's keyword arguments as the two option values. Raises UsageError for a value out of its range."""
    from flashsparse.sampling import check_sampling

    sampling = Sampling(**{name: values[name] for name in Sampling.__dataclass_fields__})
    check_sampling(**vars(sampling))
    return memory_of(values), sampling


def memory_of(values: dict[str, Any]) -> Memory:
    """The command's options of loading. Raises UsageError for what no machine like this can have, before any work."""
    from flashsparse.memory import budget_bytes
    from flashsparse.options import compute_threads

    memory = Memory(**{name: values[name] for name in Memory.__dataclass_fields__})
    compute_threads(memory.threads)
    if memory.dram is not None:
        budget_bytes(memory.dram)
    return memory


@contextmanager
def open_engine(pack: Path, memory: Memory, err: bool = True) -> Iterator[Engine]:
    """The loaded pack; its memory plan is printed before anything is loaded, to standard error unless `err` is off."""
    import flashsparse

    engine = flashsparse.load(
        pack,
        dram=memory.dram,
        max_kv_size=memory.max_kv_size,
        threads=memory.threads,
        io_threads=memory.io_threads,
        read_mode=memory.read_mode,
        lookahead=memory.lookahead,
        embeddings=memory.embeddings,
        kernels=memory.kernels,
        on_plan=lambda plan: click.echo(plan.describe(), err=err),
    )
    for note in engine.notes:
        click.echo(note, err=True)
    if err and not engine.drive_measured and sys.stderr.isatty():  # advice is for people, not for logs
        click.echo(
            "this drive has not been measured: `flashsparse doctor` takes seconds; reads follow its curve then",
            err=True,
        )
    with engine:
        yield engine
