"""`flashsparse eval`: how good a pack is on given text, against the dense model.

Owns options, the order of steps and what is printed. Measuring is flashsparse.quality's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashsparse.cli.options import Memory, memory_of, memory_options, open_engine
from flashsparse.errors import UsageError

if TYPE_CHECKING:
    from converter.model import Model
    from flashsparse.pack.manifest import Manifest
    from flashsparse.quality.evaluate import Progress, Quality, Reference

WINDOW = 512
PROMPT_TOKENS = 32
CHARACTERS_PER_TOKEN = 32  # more than any tokenizer's average
_SHARES = ("recall", "precision", "value_recall", "predicted_density", "true_density")
_existing = click.Path(exists=True, path_type=Path)


@click.command()
@click.argument("pack", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--text", "texts", multiple=True, required=True, type=_existing, help="UTF-8 text; may be repeated.")
@click.option("--reference", help="Compare with this checkpoint or pack instead of the pack's own dense form.")
@click.option("--tokens", type=click.IntRange(1), default=8192, help="Tokens of the text to judge, at most.")
@click.option("--window", type=click.IntRange(1), help="Tokens with a common history.  [default: 512, or the context]")
@click.option("--generate", type=click.IntRange(0), default=200, help="Tokens to generate per prompt; 0 is none.")
@click.option("--prompts", type=click.IntRange(1), default=4, help="Prompts to generate from.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the figures into this file.")
@click.option("--beside", multiple=True, type=_existing, help="Another evaluated pack, to draw too; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on a line of its own.")
@memory_options(max_kv_size="what the windows and generations need")
def eval(
    pack: Path,
    texts: tuple[Path, ...],
    reference: str | None,
    tokens: int,
    window: int | None,
    generate: int,
    prompts: int,
    plot: Path | None,
    beside: tuple[Path, ...],
    as_json: bool,
    **values: Any,
) -> None:
    """Measure what PACK loses: perplexity, KL and agreement with the dense model, recall and density of each layer.

    The text is judged in windows that start without history. A pack that predicts is compared with itself computing
    every neuron, which reads all of its records; it generates freely both ways too, which takes that long per token.
    The text must not be the one that the predictor was calibrated on. The figures are kept in the pack's quality.json,
    which `info` shows.
    """
    from flashsparse.pack.manifest import Manifest

    if plot is not None:
        from flashsparse.sparsity.plots import check_plot

        check_plot(plot)
    manifest = Manifest.load(pack)
    _check_texts(manifest, texts)
    window, generate = _lengths(manifest, window, generate)
    others = [(path.name, _recorded(path, texts, window)) for path in beside]
    memory = _memory(memory_of(values), window, generate)
    quality = _measure(pack, texts, reference, tokens, window, generate, prompts, memory)
    record = quality.to_dict() | _context(manifest, texts, window, reference)
    _save(pack, record)
    for line in report(record):
        click.echo(line)
    if plot is not None:
        from flashsparse.quality.plots import draw_quality

        draw_quality(plot, record, pack.name, others)
    if as_json:
        click.echo(json.dumps(record | {"flash_bytes_per_token": quality.flash_bytes_per_token}))


def _check_texts(manifest: Manifest, texts: Sequence[Path]) -> None:
    from flashsparse.sparsity.texts import refuse_same_text, text_digests

    text_digests(texts)  # refuses a text that is given twice
    if manifest.predictor is not None:
        refuse_same_text(texts, manifest.predictor.texts)


def _lengths(manifest: Manifest, window: int | None, generate: int) -> tuple[int, int]:
    """(tokens of a window, tokens to generate where there is something to compare), within the model's context."""
    context = int(manifest.config["max_position_embeddings"])
    if window is not None and window > context:
        raise UsageError(f"--window {window}: the model's context is {context} tokens")
    if manifest.tier != "predict":
        return window or min(WINDOW, context), 0  # it generates what the dense model does
    fits = max(0, context - PROMPT_TOKENS)
    if generate > fits:
        click.echo(f"generating {fits} tokens: the model's context is {context}", err=True)
    return window or min(WINDOW, context), min(generate, fits)


def _memory(memory: Memory, window: int, generate: int) -> Memory:
    from dataclasses import replace

    needed = max(window, PROMPT_TOKENS + generate if generate else 0)
    if memory.kernels == "auto":
        memory = replace(memory, kernels="native")  # judging computes on the CPU
    if memory.max_kv_size is None:
        return replace(memory, max_kv_size=needed)
    if memory.max_kv_size < needed:
        raise UsageError(f"--max-kv-size {memory.max_kv_size}: expected {needed} for this --window and --generate")
    return memory


def _measure(
    pack: Path,
    texts: Sequence[Path],
    reference: str | None,
    tokens: int,
    window: int,
    generate: int,
    prompts: int,
    memory: Memory,
) -> Quality:
    from flashsparse.pack.manifest import Manifest
    from flashsparse.quality import evaluate
    from flashsparse.sparsity.texts import read_texts

    text = read_texts(texts, CHARACTERS_PER_TOKEN * (tokens + 1))
    with ExitStack() as stack:
        other = None if reference is None else stack.enter_context(_open_reference(reference, Manifest.load(pack)))
        engine, progress = stack.enter_context(open_engine(pack, memory)), stack.enter_context(_progress())
        windows = evaluate.cut_windows(evaluate.encode(engine, text, tokens), window)
        with _reference(other, windows, progress) as dense:
            quality = evaluate.evaluate(engine, windows, dense, progress)
        if generate:
            quality.generation = evaluate.generate(engine, windows, prompts, generate, progress)
    return quality


@contextmanager
def _open_reference(source: str, manifest: Manifest) -> Iterator[Model]:
    """The model to compare with, a checkpoint or a pack. Raises UsageError when it is none, or of other tokens."""
    from converter.model import open_model
    from flashsparse.pack.manifest import MANIFEST

    chosen = manifest.activation if manifest.activation.source == "option" else None
    override = None if chosen is None or (Path(source) / MANIFEST).is_file() else chosen.name
    if override is not None and chosen is not None and chosen.param is not None:
        override += f":{chosen.param}"
    with open_model(source, override) as model:
        if model.vocab_size != manifest.vocab_size:
            raise UsageError(
                f"--reference {source}: found a vocabulary of {model.vocab_size} tokens, expected {manifest.vocab_size}"
            )
        yield model


@contextmanager
def _reference(model: Model | None, windows: Sequence[Sequence[int]], progress: Progress) -> Iterator[Reference | None]:
    """The logits of another model, walked layer by layer over all windows beforehand; its states wait on disk."""
    if model is None:
        yield None
        return
    import tempfile

    import numpy as np

    from converter.walk import walk

    with tempfile.TemporaryDirectory() as work:
        inputs = [np.array(window[:-1]) for window in windows]

        def tell(what: str, done: int, total: int) -> None:
            progress(f"reference, {what}", done, total)

        states = walk(model, inputs, work=Path(work), progress=tell)
        try:
            yield lambda window, rows: model.logits(states.read(window)[rows])
        finally:
            states.close()


def _context(manifest: Manifest, texts: Sequence[Path], window: int, reference: str | None) -> dict[str, Any]:
    """What the figures belong to: no times and no paths, so that equal evaluations give equal files."""
    import flashsparse
    from flashsparse.sparsity.texts import text_digests

    own = "dense" if manifest.tier == "predict" else None
    return {
        "pack": manifest.digest,
        "texts": list(text_digests(texts)),
        "window": window,
        "against": own if reference is None else "reference",
        "versions": {"flashsparse": flashsparse.__version__},
    }


def _save(pack: Path, record: dict[str, Any]) -> None:
    from flashsparse.quality.record import write_quality

    try:
        write_quality(pack, record)
    except OSError as error:
        click.echo(f"{pack}: the figures are not kept: {error.strerror or error}", err=True)


def _recorded(path: Path, texts: Sequence[Path], window: int) -> dict[str, Any]:
    """What was measured of another pack, on the same text in the same windows."""
    from flashsparse.pack.manifest import Manifest
    from flashsparse.quality.record import read_quality
    from flashsparse.sparsity.texts import text_digests

    found, problem = read_quality(path, Manifest.load(path).digest)
    if found is None:
        raise UsageError(f"--beside {path}: {problem or 'no quality.json; run `flashsparse eval` on it first'}")
    if (found["texts"], found["window"]) != (list(text_digests(texts)), window):
        raise UsageError(f"--beside {path}: was judged on another text or window; run `flashsparse eval` on it again")
    return found


def report(record: dict[str, Any]) -> list[str]:
    """The printed lines: a table of layers, the totals, and what generating freely showed."""
    from flashsparse.memory import format_bytes
    from flashsparse.quality.record import quality_lines

    names = [name.replace("_", " ") for name in _SHARES]
    lines = ["  ".join(["layer", *names])]
    for label, shares in [*enumerate(record["layers"]), ("all", record)]:
        cells = [_percent(shares[key]).rjust(len(name)) for key, name in zip(_SHARES, names, strict=True)]
        lines.append("  ".join([str(label).rjust(5), *cells]))
    lines += quality_lines(record)
    bits = "-" if record["bits_per_byte"] is None else f"{record['bits_per_byte']:.4f}"
    selected, whole = (format_bytes(record[key]) for key in ("selected_bytes_per_token", "ffn_bytes"))
    lines.append(f"{bits} bits per byte; a token's neurons weigh {selected} of {whole}")
    return lines + _generation(record["generation"])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _generation(generation: dict[str, Any] | None) -> list[str]:
    if generation is None:
        return []
    prompts, equal, parted = generation["prompts"], 100 * generation["equal_share"], generation["mean_divergence"]
    sampled, own = generation["sampled_perplexity"], generation["dense_sampled_perplexity"]
    return [
        f"greedy from {prompts} prompts: {equal:.1f} % of the tokens are the dense model's; they part after "
        f"{parted:.0f} of {generation['tokens'] / prompts:.0f} tokens on average",
        f"samples have perplexity {sampled:.4g} under the dense model, its own have {own:.4g}",
    ]


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal with the time left, a line per step otherwise; both on standard error."""
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def tell(what: str, done: int, total: int) -> None:
            if what not in seen:
                seen.add(what)
                click.echo(what, err=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            key = what.split()[0]
            if key not in tasks:
                tasks[key] = bar.add_task(what, total=total)
            bar.update(tasks[key], description=what, completed=done, total=total)

        yield show
