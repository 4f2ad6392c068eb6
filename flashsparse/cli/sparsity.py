"""`flashsparse sparsity`: how few neurons a model needs, by a published metric; or a picture of a calibration.

Owns options, progress and the table. Measuring is `converter.sparsing`, drawing `flashsparse.sparsity.plots`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flashsparse.cli.progress import walk_progress
from flashsparse.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from converter.model import Model
    from converter.sparsing import Point, Sparsing
    from flashsparse.sparsity.thresholds_file import Thresholds

METRICS = ("topk", "fat", "pplp", "cats", "teal")  # flashsparse.sparsity.metrics says what they are
WINDOW = 512
PPLP = 1.0  # per cent
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class Request:
    """What is measured: a metric at `arg`, or the setting of it that reaches `ppl_ratio`."""

    metric: str
    arg: float | None
    ppl_ratio: float | None


@click.command()
@click.argument("src", required=False)
@click.option("--text", type=EXISTING, multiple=True, help="Text to measure on (UTF-8, or .zst of it); repeatable.")
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default="pplp",
    show_default=True,
    help="topk, fat: the largest |act(gate)|, by share or threshold; pplp: PPL-p% by CETT (Sparsing Law); cats; teal.",
)
@click.option(
    "--arg",
    type=float,
    help="topk: fraction kept; fat: threshold; pplp: allowed rise of perplexity in %  [default: 1]; cats, teal: share "
    "skipped.",
)
@click.option("--ppl-ratio", type=float, metavar="R", help="Search the sparsest setting below this, e.g. 1.01.")
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True, help="Tokens to measure on.")
@click.option("--window", type=click.IntRange(2), help=f"Tokens per sequence.  [default: {WINDOW}, or the context]")
@click.option(
    "--calibration-text",
    type=EXISTING,
    multiple=True,
    help="Text to find thresholds on; repeatable.  [default: the text measured on]",
)
@click.option("--activation", metavar="NAME[:PARAM]", help="In place of the configuration's, as for convert.")
@click.option("--statistics", type=click.Path(exists=True, path_type=Path), help="Plot this calibration; no SRC.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw to this file (png, pdf, svg).")
@click.option("--save-thresholds", type=click.Path(dir_okay=False, path_type=Path), help="Write them to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def sparsity(
    src: str | None,
    text: tuple[Path, ...],
    metric: str,
    arg: float | None,
    ppl_ratio: float | None,
    tokens: int,
    window: int | None,
    calibration_text: tuple[Path, ...],
    activation: str | None,
    statistics: Path | None,
    plot: Path | None,
    save_thresholds: Path | None,
    as_json: bool,
) -> None:
    """Measure how many neurons SRC needs, and what skipping the others costs in perplexity.

    SRC is a checkpoint directory, a repository id or a pack. Thresholds are per layer and apply to all layers at once.
    """
    if plot is not None:
        from flashsparse.sparsity.plots import check_plot

        check_plot(plot)
    if statistics is not None:
        _draw_statistics(src, text, statistics, plot)
        return
    if src is None or not text:
        raise UsageError("expected SRC and --text FILE (or --statistics DIR): what to measure, and on which text")
    request = _request(metric, arg, ppl_ratio)
    if save_thresholds is not None and not save_thresholds.parent.is_dir():  # before the work that they come from
        raise UsageError(f"--save-thresholds {save_thresholds}: {save_thresholds.parent} is no directory")
    _check_texts(text, calibration_text)
    from converter.model import open_model

    with open_model(src, activation) as model:
        measured, point = _measure(model, request, text, calibration_text, tokens, window)
        found = _thresholds(model, request, point, calibration_text or text, measured.tokens)
        report = _report(measured, point, found)
        for line in table(report):
            click.echo(line)
        if save_thresholds is not None:
            _save(found, save_thresholds)
        if plot is not None:
            _draw(report, plot, model.directory.resolve().name)
    if as_json:
        click.echo(json.dumps(report))


def _request(metric: str, arg: float | None, ppl_ratio: float | None) -> Request:
    if arg is not None and ppl_ratio is not None:
        raise UsageError("--arg and --ppl-ratio exclude each other: give the setting, or the cost to search it for")
    if ppl_ratio is not None and not 1 < ppl_ratio < float("inf"):
        raise UsageError(f"--ppl-ratio {ppl_ratio:g}: expected a number above 1, for example 1.01 for one per cent")
    if metric == "pplp" and ppl_ratio is None:
        percent = PPLP if arg is None else arg
        if not 0 < percent < float("inf"):
            raise UsageError(f"--arg {percent:g}: expected a rise of perplexity in per cent, above 0")
        return Request(metric, None, 1 + percent / 100)
    if arg is None and ppl_ratio is None:
        raise UsageError(f"--metric {metric} needs --arg (a setting) or --ppl-ratio (search one)")
    return Request(metric, arg, ppl_ratio)


def _check_texts(text: Sequence[Path], calibration: Sequence[Path]) -> None:
    from flashsparse.sparsity.texts import file_sha256, text_digests

    seen = text_digests(text)
    text_digests(calibration)  # refuses a text that is given twice
    for path in calibration:
        if file_sha256(path) in seen:
            raise UsageError(f"{path}: given as --text too; without --calibration-text both are the same text")


def _measure(
    model: Model, request: Request, text: Sequence[Path], calibration: Sequence[Path], tokens: int, window: int | None
) -> tuple[Sparsing, Point]:
    from converter.sparsing import check_setting, open_sparsing, search_walks

    if request.arg is not None:
        check_setting(request.metric, request.arg, model.activation.name)
    length = min(WINDOW, model.context) if window is None else window
    windows = _windows(model, text, tokens, length)
    others = _windows(model, calibration, tokens, length) if calibration else None
    walks = 1 if request.arg is not None else search_walks()
    with (
        walk_progress(_walk_of) as progress,
        open_sparsing(model, windows, [request.metric], others, progress=progress, walks=walks) as sparsing,
    ):
        if request.arg is not None:
            return sparsing, sparsing.at(request.metric, request.arg)
        assert request.ppl_ratio is not None
        return sparsing, sparsing.search(request.metric, request.ppl_ratio)


def _windows(model: Model, texts: Sequence[Path], tokens: int, length: int) -> list[np.ndarray]:
    from converter.text import read_ids
    from converter.walk import windows_of

    if length > model.context:
        raise UsageError(f"--window {length}: expected at most {model.context}, the model's context")
    windows = [w for ids in read_ids(model.tokenizer(), texts, tokens) for w in windows_of(ids, length)]
    if not windows:
        raise UsageError(f"{texts[0]}: less than 2 tokens of text, so that there is nothing to predict")
    return windows


def _thresholds(model: Model, request: Request, point: Point, texts: Sequence[Path], tokens: int) -> Thresholds:
    from converter.sparsing import model_shape
    from flashsparse.sparsity.metrics import METRICS as QUANTITY
    from flashsparse.sparsity.texts import text_digests
    from flashsparse.sparsity.thresholds_file import Thresholds

    arg = point.setting
    if point.metric == "pplp" and request.ppl_ratio is not None:
        arg = round(100 * (request.ppl_ratio - 1), 9)
    return Thresholds(
        QUANTITY[point.metric],
        point.metric,
        arg,
        model_shape(model),
        point.thresholds,
        point.layers,
        point.ppl_ratio,
        text_digests(texts),
        tokens,
    )


def _report(sparsing: Sparsing, point: Point, found: Thresholds) -> dict[str, Any]:
    import math

    keys = ("activation_ratio", "nonzero", "threshold", "dead")
    rows = zip(point.layers, sparsing.density, point.thresholds, point.dead, strict=True)
    return {
        "metric": point.metric,
        "quantity": found.quantity,
        "arg": found.arg,
        "setting": point.setting,
        "activation_ratio": point.activation_ratio,
        "sparsity": 1 - point.activation_ratio,
        "ppl_ratio": point.ppl_ratio,
        "dense_perplexity": math.exp(sparsing.dense_loss),
        "activation": found.model.activation,
        "neurons": found.model.intermediate_size,
        "tokens": sparsing.tokens,
        "sample_tokens": sparsing.samples.tokens,
        "texts": list(found.texts),
        "layers": [dict(zip(keys, row, strict=True)) for row in rows],
    }


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines: one per layer, then the totals."""
    lines = [f"{'layer':>5}  {'active':>8}  {'not zero':>8}  {'threshold':>10}  {'dead':>6}"]
    for number, layer in enumerate(report["layers"]):
        shares = f"{layer['activation_ratio']:8.2%}  {layer['nonzero']:8.2%}"
        lines.append(f"{number:>5}  {shares}  {layer['threshold']:>10.4g}  {layer['dead']:>6}")
    setting = f"{report['metric']} {report['arg']:.6g}"
    if report["metric"] == "pplp":
        setting = f"PPL-{report['arg']:g}%, CETT {report['setting']:.6f}"
    return [
        *lines,
        f"metric            {setting}",
        f"activation ratio  {report['activation_ratio']:.2%} of {report['neurons']} neurons per layer",
        f"perplexity        {report['dense_perplexity']:.3f} dense, {100 * (report['ppl_ratio'] - 1):+.3f} % sparse",
        f"text              {report['tokens']} tokens; thresholds from {report['sample_tokens']}",
    ]


def _save(found: Thresholds, path: Path) -> None:
    from flashsparse.sparsity.thresholds_file import write_thresholds

    write_thresholds(path, found)
    click.echo(f"thresholds        {path}")


def _draw(report: dict[str, Any], path: Path, name: str) -> None:
    from flashsparse.sparsity.plots import draw_layers

    label = f"PPL-{report['arg']:g}%" if report["metric"] == "pplp" else f"{report['metric']} {report['arg']:.4g}"
    label += f" (perplexity {100 * (report['ppl_ratio'] - 1):+.2f} %)"
    series = [
        ("not zero", [layer["nonzero"] for layer in report["layers"]]),
        (label, [layer["activation_ratio"] for layer in report["layers"]]),
    ]
    draw_layers(path, series, f"{name}: active neurons, {report['tokens']} tokens")


def _draw_statistics(src: str | None, text: Sequence[Path], calibration: Path, plot: Path | None) -> None:
    from flashsparse.sparsity.calibration import open_calibration
    from flashsparse.sparsity.plots import draw_statistics

    if src is not None or text:
        raise UsageError("--statistics draws a calibration that is there: give neither SRC nor --text with it")
    if plot is None:
        raise UsageError("--statistics needs --plot FILE, the picture to draw")
    found = open_calibration(calibration)
    draw_statistics(plot, found, f"{found.description['tokens']} tokens, {found.layers} layers")


def _walk_of(what: str) -> str:
    """Without the layer, which a line is not worth."""
    return what.rpartition(", layer")[0]
