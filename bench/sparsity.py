"""How many neurons checkpoints need at equal perplexity, metric by metric, as a figure and one JSON document.

python bench/sparsity.py --text FILE [--text FILE] relu=flashsparse/demo_model silu=DIR --out docs/sparsity.png

For every LABEL=CHECKPOINT and metric: the frontier of activation ratio against perplexity, and by search the least
ratio within one per cent of the dense perplexity (Sparsing Law's PPL-1% for pplp). Needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converter.model import open_model
from converter.sparsing import Point, Sparsing, open_sparsing
from converter.text import read_ids
from converter.walk import windows_of
from flashsparse.sparsity.plots import Curve, check_plot, draw_frontiers

METRICS = ("topk", "fat", "pplp")
NAMES = {"topk": "Top-k", "fat": "FAT", "pplp": "CETT", "cats": "CATS", "teal": "TEAL"}
STEPS = (0.25, 0.5, 0.75, 1.25, 1.6, 2.0)  # settings of the frontier, as multiples of the one at the allowed rise
ALLOWED = 1.01  # perplexity ratio


def frontier(sparsing: Sparsing, metric: str) -> tuple[Point, list[Point]]:
    """(the point at the allowed rise, that one and others around it by falling setting)"""
    found = sparsing.search(metric, ALLOWED)
    settings = [found.setting * step for step in STEPS]
    if metric == "topk":
        settings = [found.setting / step for step in STEPS]
    if metric in ("cats", "teal"):  # the share kept is what is scaled
        settings = [1 - (1 - found.setting) / step for step in STEPS]
    usable = [setting for setting in settings if 0 <= setting <= 1 or metric == "fat"]
    return found, sorted([found, *sparsing.frontier(metric, usable)], key=lambda point: point.activation_ratio)


def measure(source: str, texts: list[Path], tokens: int, window: int, metrics: list[str]) -> dict[str, Any]:
    """Frontiers of one checkpoint."""
    with open_model(source) as model:
        windows = [part for ids in read_ids(model.tokenizer(), texts, tokens) for part in windows_of(ids, window)]
        with open_sparsing(model, windows, metrics) as sparsing:
            found = {metric: frontier(sparsing, metric) for metric in metrics}
        return {
            "source": Path(source).name,
            "activation": model.activation.name,
            "dense_loss": sparsing.dense_loss,
            "not_zero": sparsing.density,
            "tokens": sparsing.tokens,
            "sample_tokens": sparsing.samples.tokens,
            "within": {metric: _document(best) for metric, (best, _) in found.items()},
            "frontiers": {metric: [_document(point) for point in points] for metric, (_, points) in found.items()},
        }


def _document(point: Point) -> dict[str, Any]:
    return {"activation_ratio": point.activation_ratio, **asdict(point)}


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    curves = [
        Curve(label, NAMES[metric], tuple((p["activation_ratio"], p["ppl_ratio"]) for p in points))
        for label, result in results.items()
        for metric, points in result["frontiers"].items()
    ]
    bars = [
        (f"{label}, {NAMES[metric]} within +{100 * (ALLOWED - 1):.0f} %", point["layers"])
        for label, result in results.items()
        for metric, point in result["within"].items()
        if metric == "pplp"
    ]
    tokens = next(iter(results.values()))["tokens"]
    draw_frontiers(path, curves, f"Neurons needed at equal perplexity ({tokens} tokens)", bars)


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'model':<12} {'metric':<6} {'active':>8} {'perplexity':>11}   (not zero)"]
    for label, result in results.items():
        zero = sum(result["not_zero"]) / len(result["not_zero"])
        for metric, point in result["within"].items():
            rise = 100 * (point["ppl_ratio"] - 1)
            lines.append(f"{label:<12} {metric:<6} {point['activation_ratio']:8.2%} {rise:+10.3f} %   ({zero:.1%})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=CHECKPOINT")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--metric", action="append", choices=sorted(NAMES))
    parser.add_argument("--out", type=Path, help="the figure (png, pdf, svg)")
    parser.add_argument("--json", type=Path, help="the numbers")
    args = parser.parse_args()
    pairs = [one.partition("=")[::2] for one in args.checkpoints]
    if not all(label and source for label, source in pairs):
        parser.error("expected LABEL=CHECKPOINT")
    if args.out:
        check_plot(args.out)
    results = {}
    for label, source in pairs:
        results[label] = measure(source, args.text, args.tokens, args.window, args.metric or list(METRICS))
    print("\n".join(table(results)))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.out:
        draw(args.out, results)


if __name__ == "__main__":
    main()
