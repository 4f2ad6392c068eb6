"""`flashsparse calibrate`: options, progress and the table at the end. The work is `converter.calibrate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from flashsparse.cli.progress import walk_progress

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
COLUMNS = ("layer", "density", "kept 1", "kept 4", "kept 16", "union 4", "jaccard", "similarity", "never active")


@click.command()
@click.argument("src")
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    metavar="FILE",
    help="UTF-8 text, or .zst of one; several share the tokens evenly.",
)
@click.option("--tokens", type=click.IntRange(2), default=10000, show_default=True, help="Tokens to measure on.")
@click.option(
    "--window",
    type=click.IntRange(2),
    default=None,
    help="Tokens per independent sequence.  [default: 512, or the context if that is less]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Directory of the result.  [default: NAME-calibration, here]",
)
@click.option(
    "--activation",
    metavar="NAME[:PARAM]",
    default=None,
    help="silu, relu, relu2, fatrelu:THRESHOLD or drelu, in place of the configuration's.  [default: config.json's]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0),
    default=None,
    help="Count a neuron as active when |act(gate)| is above this.  [default: when it is not 0; none for silu]",
)
@click.option("--force", is_flag=True, help="Start over, and replace a calibration that is there.  [default: off]")
@click.option("--json", "as_json", is_flag=True, help="Print the description as one line of JSON.  [default: off]")
def calibrate(
    src: str,
    texts: tuple[Path, ...],
    tokens: int,
    window: int | None,
    out: Path | None,
    activation: str | None,
    threshold: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure which neurons fire: frequency, persistence, co-activation, norms and similarities of each layer.

    SRC is a checkpoint directory, a Hugging Face repository id (OWNER/NAME) or a pack. A run that was stopped
    continues when it is started again with the same options.
    """
    from converter.calibrate import calibrate as run
    from flashsparse.sparsity.calibration import DESCRIPTION, read_description

    directory = out or Path(f"{Path(src).expanduser().resolve().name}-calibration")
    try:
        with walk_progress() as progress:
            run(
                src,
                texts,
                out=directory,
                tokens=tokens,
                window=window,
                activation=activation,
                threshold=threshold,
                resume=not force,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept = f"finished layers are kept in {directory}, run again to continue"
        if (directory / DESCRIPTION).exists():  # with --force: the next run takes it, or starts over
            kept = f"the calibration that was in {directory} stays"
        click.echo(f"Interrupted; {kept}.", err=True)
        sys.exit(INTERRUPTED)
    description = read_description(directory)
    if description["tokens"] < tokens:
        click.echo(f"note: {description['tokens']} tokens, as the texts hold no more of the {tokens} asked", err=True)
    for line in [json.dumps(description)] if as_json else [str(directory), *table(description)]:
        click.echo(line)


def table(description: dict[str, Any]) -> list[str]:
    """One line per layer: shares of the layer's neurons and of a token's set, in per cent."""
    rows = [_row(n, layer) for n, layer in enumerate(description["layers"])]
    widths = [max(len(row[n]) for row in (*rows, COLUMNS)) for n in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (COLUMNS, *rows)]
    model, window = description["model"], description["options"]["window"]
    facts = f"{description['tokens']} tokens in windows of {window}, {model['activation']['name']}"
    if description["active"] is None:
        return [f"{facts}: no neuron is exactly zero; --threshold says what counts as active", *lines]
    active = description["active"].replace("threshold", str(description["options"]["threshold"]))
    return [f"{facts}, active: {active}; kept k: active in one of the k tokens before", *lines]


def _row(number: int, layer: dict[str, Any]) -> tuple[str, ...]:
    kept, union = layer["persistence"] or {}, layer["union"] or {}
    shares = [layer["density"], kept.get("1"), kept.get("4"), kept.get("16"), union.get("4"), layer["jaccard"]]
    similarity, never = layer["similarity"]["output"], layer["never_active"]
    return (
        str(number),
        *("-" if share is None else f"{100 * share:.1f} %" for share in shares),
        "-" if similarity is None else f"{similarity:.3f}",
        "-" if never is None else str(never),
    )
