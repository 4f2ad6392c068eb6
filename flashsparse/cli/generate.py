"""`flashsparse generate`: one prompt, one continuation, its figures; for scripts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from flashsparse.cli.options import Sampling, memory_options, open_engine, sampling_options, split
from flashsparse.cli.packs import resolve_pack
from flashsparse.cli.report import full_note, printable, stats_line, write
from flashsparse.errors import UsageError

if TYPE_CHECKING:
    from flashsparse import Engine


@click.command()
@click.argument("pack")
@click.option(
    "-p", "--prompt", required=True, help="Text to continue, - for standard input; token ids without a tokenizer."
)
@sampling_options(temp=0.0, max_tokens=256)
@memory_options()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text and figures as the last line.")
@click.option("--stats", is_flag=True, help="Print the figures on standard error.")
@click.option("-y", "--yes", is_flag=True, help="Convert a checkpoint into the cache directory without asking.")
def generate(pack: str, prompt: str, as_json: bool, stats: bool, yes: bool, **values: Any) -> None:
    """Continue a prompt, once.

    PACK is a pack, or a checkpoint directory or repository id, which is converted once into the cache directory. The
    memory plan goes to standard error.
    """
    memory, sampling = split(values)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty: give at least one character")
    with open_engine(resolve_pack(pack, yes), memory) as engine:
        result = run(engine, to_prompt(engine, printable(text)), sampling)
    if as_json:
        click.echo(json.dumps(result))
    if stats:
        click.echo(stats_line(result), err=True)


def to_prompt(engine: Engine, text: str) -> str | list[int]:
    """The text itself, or the token ids it spells when the pack has no tokenizer."""
    if engine.tokenizer is not None:
        return text
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"this pack has no tokenizer: write token ids such as '1 15 7', found {text[:40]!r}") from None


def run(engine: Engine, prompt: str | list[int], sampling: Sampling) -> dict[str, Any]:
    """Stream the continuation to standard output; returns text, tokens, finish_reason and the figures."""
    pieces: list[str] = []
    tokens: list[int] = []
    last = None
    with engine.session() as session:
        try:
            for last in session.generate(prompt, **vars(sampling)):
                pieces.append(last.text)
                tokens.append(last.token)
                write(last.text if engine.tokenizer is not None else f"{last.token} ")
        finally:
            if tokens:
                write("\n")
        if session.full and last is not None and last.finish_reason == "length":
            click.echo(full_note(session), err=True)
    figures = last.stats.to_dict() if last is not None else {}
    reason = last.finish_reason if last is not None else None
    return {"text": "".join(pieces), "tokens": tokens, "finish_reason": reason, **figures}
