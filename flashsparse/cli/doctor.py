"""`flashsparse doctor`: what this drive and this memory give, and what speed a model would have with them."""

from __future__ import annotations

import json
import math
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from flashsparse.errors import UsageError, format_bytes

if TYPE_CHECKING:
    from flashsparse.codec_outlook import CodecSample
    from flashsparse.machine import Curve
    from flashsparse.outlook import Outlook, Shape


@click.command()
@click.argument("model", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--dram", metavar="SIZE", help="Memory budget: 7GB, 4GiB, 50%.  [default: as chat chooses it]")
@click.option("--tier", type=click.Choice(["exact", "predict", "dense"]), default="predict", help="Of a checkpoint.")
@click.option("--bits", type=click.Choice(["4", "8", "16"]), default="16", help="Of a checkpoint.")
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), help="Share of the neurons a token needs.")
@click.option("--hit-rate", type=click.FloatRange(0, 1), help="Share of a token's records that are in slots already.")
@click.option(
    "--at",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure the drive of this folder.  [default: the model's, else the current folder]",
)
@click.option("--again", is_flag=True, help="Measure, also when this drive's curve is known.")
@click.option("--threads", type=click.IntRange(1), help="Threads that read memory.  [default: one per core]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curve (png, pdf, svg).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    model: Path | None,
    dram: str | None,
    tier: str,
    bits: str,
    density: float | None,
    hit_rate: float | None,
    at: Path | None,
    again: bool,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure the drive, and say what speed to expect of MODEL: a pack, or a checkpoint not converted yet.

    The curve is measured once for each drive, in a few seconds, on the pack's own files or on a temporary file of
    512 MiB, and kept in the user's cache; reading then follows it. A doubtful curve, or one of 30 days ago, is
    measured again.
    """
    from flashsparse.codec_outlook import sample_codec
    from flashsparse.machine import find_curve, memory_rate
    from flashsparse.options import compute_threads
    from flashsparse.outlook import checkpoint_shape, expect, pack_shape
    from flashsparse.pack.manifest import Manifest

    if plot is not None:
        from flashsparse.sparsity.plots import check_plot

        check_plot(plot)
    compute_threads(threads)
    for name, share in (("density", density), ("hit-rate", hit_rate)):
        if share is not None and math.isnan(share):  # which lies in no range, and outside of none
            raise UsageError(f"--{name} nan: expected a number from 0 to 1")
    shape = codec = None
    if model is not None and (model / "pack.json").is_file():
        _check_unset("tier", "bits")
        shape = pack_shape(model, dram)
        codec = sample_codec(Manifest.load(model), threads or os.cpu_count() or 1)
    elif model is not None:
        from converter.expected import expected_manifest

        shape = checkpoint_shape(model, expected_manifest(model, tier, int(bits)), dram)
    curve, known = find_curve(at or model or Path(), again, lambda problem: click.echo(problem, err=True))
    memory = memory_rate(threads)
    outlook = expect(shape, curve, memory, density, hit_rate) if shape else None
    if plot is not None:
        from flashsparse.curve_plot import draw_curve

        draw_curve(plot, curve, shape.record_bytes if shape else None)
    if as_json:
        click.echo(json.dumps(report(curve, memory, shape, outlook, codec)))
        return
    click.echo("\n".join([*lines(curve, known, memory, shape, outlook), *codec_lines(curve, codec)]))


def _check_unset(*names: str) -> None:
    """Raises UsageError for options that say how a checkpoint would be converted, given for a pack."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UsageError(f"--{name} is for a checkpoint; a pack has its own (see `flashsparse info`): leave it out")


def report(
    curve: Curve, memory: float, shape: Shape | None, outlook: Outlook | None, codec: CodecSample | None = None
) -> dict[str, Any]:
    """Everything that is printed, as plain values; rates in bytes per second."""
    from dataclasses import asdict

    facts: dict[str, Any] = {"curve": curve.to_dict(), "mode": curve.mode, "memory": memory}
    if shape is not None and outlook is not None:
        merging = curve.merging(shape.stride)
        facts |= {"model": asdict(shape), "outlook": outlook.to_dict(), "merging": asdict(merging)}
        facts["best"], facts["depth"] = curve.best(shape.record_bytes), curve.depth(shape.record_bytes)
    if codec is not None:
        facts["codec"] = {**codec.to_dict(), "gain": codec.gain(curve)}
    return facts


def codec_lines(curve: Curve, codec: CodecSample | None) -> list[str]:
    """Whether compressed records would pay on this drive; nothing where there are none to compress."""
    if codec is None:
        return []
    gain = codec.gain(curve)
    verdict = "would pay here" if gain > 1 else "does not pay here"
    below = format_bytes(round(codec.pays_below))
    drives = f"below {below}/s it does" if codec.ratio > 1 else "its records do not become smaller"
    return [
        f"zstd           {codec.ratio:.2f} to 1, decompressed at {codec.decode_rate / 1e9:.2f} GB/s: a record in "
        f"{1 / gain:.2f} times the time, {verdict} ({drives})"
    ]


def lines(curve: Curve, known: bool, memory: float, shape: Shape | None, outlook: Outlook | None) -> list[str]:
    """What the terminal shows."""
    when = datetime.fromtimestamp(curve.measured).strftime("%Y-%m-%d %H:%M")
    text = [
        f"drive          {curve.device}",
        f"measured       {when}{'; --again measures anew' if known else ', now'}; "
        f"passes agree within {100 * (curve.spread - 1):.0f} %",
        *(f"doubtful       {doubt}: measure again on a quiet machine (--again)" for doubt in curve.doubts()),
    ]
    for name, rates in (("direct", curve.direct), ("buffered", curve.buffered)):
        text += _table(name, rates)
    text.append(f"in order       {curve.sequential / 1e9:.2f} GB/s")
    text.append(f"best mode      {curve.mode}")
    text.append(f"memory         {memory / 1e9:.1f} GB/s")
    return text if shape is None or outlook is None else [*text, "", *_model(curve, shape, outlook)]


def _table(name: str, rates: Any) -> list[str]:
    from flashsparse.machine import DEPTHS, SIZES

    if rates is None:
        why = "refused by the file system" if name == "direct" else "the page cache could not be emptied"
        return [f"{name:<15}{why}"]
    head = f"{name + ', GB/s':<15}" + "".join(f"{depth:>7}" for depth in DEPTHS) + "  in flight"
    rows = [
        f"{f'{size >> 10} KiB':>13}  " + "".join(f"{rate / 1e9:>7.2f}" for rate in row)
        for size, row in zip(SIZES, rates, strict=True)
    ]
    return [head, *rows]


def _model(curve: Curve, shape: Shape, outlook: Outlook) -> list[str]:
    merging, best = curve.merging(shape.stride), curve.best(shape.record_bytes)
    gap = f"across gaps of up to {format_bytes(merging.gap)}" if merging.gap >= 0 else "never"
    share = min(1.0, shape.slots / shape.records)
    embedding = f"on flash, {shape.row} bytes of it per token" if shape.row else "in memory"
    return [
        f"model          {shape.name}",
        f"  tier         {shape.tier}, {shape.layers} layers of {shape.records} records of {shape.record_bytes} bytes",
        f"  budget       at least {format_bytes(shape.floor)}, everything {format_bytes(shape.needs)}",
        f"  slots        {shape.slots:.0f} in a layer ({100 * share:.0f} %)",
        f"  embedding    {embedding}",
        f"  density      {100 * outlook.density:.3g} % ({outlook.density_from})",
        f"  hit rate     {outlook.hit_rate:.2f} ({outlook.hit_rate_from})",
        f"  one record   {best / 1e9:.2f} GB/s at {curve.depth(shape.record_bytes)} in flight; neighbours are read "
        f"together {gap}",
        f"reading        {format_bytes(outlook.read_bytes)} per token: {1000 * outlook.read_s:.0f} ms",
        f"memory         {format_bytes(outlook.touched_bytes)} per token: {1000 * outlook.memory_s:.0f} ms",
        f"expect         at most {outlook.tokens_per_second:.3g} tokens/s ({outlook.rule})",
    ]
