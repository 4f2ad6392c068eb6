"""`flashsparse demo`: the embedded model, converted once, streamed under a budget that cannot hold it.

Owns the demo's budget, prompt and summary.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flashsparse.cli.options import memory_options, open_engine, sampling_options, split
from flashsparse.cli.packs import cache_dir, convert_once
from flashsparse.cli.report import percent, stats_line, write
from flashsparse.errors import BudgetError, FlashSparseError, UsageError
from flashsparse.memory import format_bytes

if TYPE_CHECKING:
    from flashsparse import Engine

Result = TypeVar("Result")
PROMPT = "Once upon a time"
# Of the model's size. Resident weights, KV cache and buffers are most of so small a model; about an eighth of its
# neurons fit in what is left.
BUDGET_SHARE = 0.97
# Tokens of KV cache: the story and a few turns of chat. The model's whole context would take slots from a small budget.
CONTEXT = 288


@click.command()
@click.option("-p", "--prompt", default=PROMPT, help="How the story begins.")
@sampling_options(temp=0.7, max_tokens=200)
@memory_options(dram=f"{BUDGET_SHARE:.0%} of the model's size", max_kv_size=str(CONTEXT))
def demo(prompt: str, **values: Any) -> None:
    """Stream the embedded model under a small budget.

    The model is converted into the cache directory the first time. Prints the memory plan, a story and its figures; in
    a terminal it then stays in chat.
    """
    if not prompt:
        raise UsageError("the prompt is empty: give at least one character")
    pack = demo_pack()
    size = sum(file.stat().st_size for file in pack.glob("*.safetensors"))
    given, share = values["dram"], int(BUDGET_SHARE * size)
    values["max_kv_size"] = values["max_kv_size"] or min(CONTEXT, _context_limit(pack))
    memory, sampling = split(values)

    def run(dram: int) -> None:
        with open_engine(pack, replace(memory, dram=given or str(dram)), err=False) as engine:
            tell(engine, prompt, vars(sampling), size)
            if sys.stdin.isatty() and sys.stdout.isatty():
                from flashsparse.cli.chat import talk

                talk(engine, sampling)

    if given:
        run(share)
    else:
        at_least(share, run)


def at_least(budget: int, run: Callable[[int], Result]) -> Result:
    """`run(budget)`, or with the smallest budget that works where that is more: a GPU's buffers are larger."""
    try:
        return run(budget)
    except BudgetError as error:
        return run(error.smallest)


def demo_pack() -> Path:
    """The embedded model as a pack in the cache directory, converted on first use."""
    import flashsparse

    source = files("flashsparse") / "demo_model"
    if not source.joinpath("config.json").is_file():
        raise FlashSparseError("the demo model is missing from this installation: install FlashSparse again")
    with ExitStack() as stack:
        folder = stack.enter_context(as_file(source))
        target = cache_dir() / "demo" / f"{flashsparse.__version__}-{_digest(folder)}"
        return convert_once(folder, target)


def _context_limit(pack: Path) -> int:
    from flashsparse.pack.manifest import Manifest

    return int(Manifest.load(pack).config["max_position_embeddings"])


def _digest(folder: Path) -> str:
    """Of every file's name and bytes, so that another model is another pack."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def tell(engine: Engine, prompt: str, sampling: dict[str, Any], size: int) -> None:
    """Stream one story, then its figures."""
    write(f"\n{prompt}")
    last = None
    with engine.session() as session:
        for last in session.generate(prompt, **sampling):
            write(last.text)
    write("\n\n")
    if last is not None:
        for line in summary(last.stats.to_dict(), engine.plan.slots, engine.manifest.intermediate_size, size):
            click.echo(line)


def summary(stats: dict[str, Any], slots: tuple[int, ...], neurons: int, size: int) -> list[str]:
    """The figures of the demo, one line per figure that matters."""
    used = stats["peak_memory_bytes"] - stats["runtime_bytes"]
    return [
        f"speed         {stats['generation_tps']:.1f} tokens/s",
        f"flash         {format_bytes(int(stats['flash_bytes_per_token']))} read per token, {stats['read_mode']} reads",
        f"hit rate      {percent(stats['hit_rate'])} of the neurons needed were in memory",
        f"FFN in slots  {sum(slots)} of {neurons * len(slots)} neurons at most",
        f"peak memory   {format_bytes(used)} of a budget of {format_bytes(stats['budget_bytes'])}; the model is "
        f"{format_bytes(size)} (Python and its libraries: {format_bytes(stats['runtime_bytes'])} before loading)",
        stats_line(stats),
    ]
