"""`python -m bench.predictors CHECKPOINT --calibrate FILE --text FILE --out DIR`: the frontier of a checkpoint.

Prints tables and writes them as JSON beside two pictures. Fits see the calibration text only, every figure is measured
on the other one; all layers are masked at once, masked neurons are removed before the down projection.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.predictors import draw
from bench.predictors.data import Judge, LayerData, Outcome, collect, text_windows
from bench.predictors.fits import Fitted, default_copy, fits
from bench.predictors.hints import measure_hints
from converter.model import Model, open_model
from converter.predictors.thresholds import calibrate
from flashsparse.sparsity.selection import select
from flashsparse.sparsity.texts import file_sha256

SHARES = (0.35, 0.5, 0.65, 0.8, 1.0, 1.5)  # of the true density
RECALLS = (0.9, 0.95, 0.98, 0.99)
STEPS = 12  # of the search for the common value recall of a density


@dataclass(frozen=True)
class Rule:
    """What one layer selects by, and the density that it had on the calibration sample."""

    threshold: float | None
    k: int | None
    density: float


@dataclass(frozen=True)
class Curve:
    """One layer's scores [T, I]; and sorted from the highest on, with the share of all value that they hold."""

    scores: np.ndarray
    ordered: np.ndarray
    held: np.ndarray

    @staticmethod
    def of(scores: np.ndarray, layer: LayerData) -> Curve:
        order = np.argsort(scores, axis=None)[::-1]
        held = np.cumsum(layer.values.ravel()[order], dtype=np.float64)
        return Curve(scores, scores.ravel()[order], held / held[-1])

    def at(self, recall: float) -> Rule:
        """The highest threshold with which `recall` of the value is kept; the same as converter's `calibrate` finds."""
        last = min(int(np.searchsorted(self.held, recall)), len(self.held) - 1)
        threshold = float(self.ordered[last])
        selected = np.searchsorted(-self.ordered, -threshold, side="right")  # all that tie are selected
        return Rule(threshold, None, float(selected) / len(self.held))


@dataclass(frozen=True)
class Setting:
    """One rule per layer, calibrated: what a pack's manifest would hold."""

    selection: str
    layers: tuple[Rule, ...]

    @property
    def density(self) -> float:
        return float(np.mean([layer.density for layer in self.layers]))


class Bench:
    """One checkpoint with its calibration data and its judge."""

    def __init__(self, model: Model, data: Sequence[LayerData], judge: Judge) -> None:
        self.model, self.data, self.judge = model, data, judge
        self.true_density = float(np.mean([layer.density for layer in data]))
        self._for = ""  # the predictor whose curves these are
        self._curves: list[Curve] = []

    def curves(self, fitted: Fitted) -> list[Curve]:
        """What it selects of the calibration sample; the last predictor's are kept."""
        if self._for != fitted.name:
            pairs = zip(fitted.layers, self.data, strict=True)
            self._for, self._curves = fitted.name, [Curve.of(scorer(layer.x), layer) for scorer, layer in pairs]
        return self._curves

    def at_recall(self, fitted: Fitted, goal: float, selection: str = "threshold") -> Setting:
        pairs = zip(self.curves(fitted), self.data, strict=True)
        if selection == "threshold":
            return Setting(selection, tuple(curve.at(goal) for curve, _ in pairs))
        found = (calibrate(c.scores, d.values, d.active, "value_recall", goal, selection) for c, d in pairs)
        return Setting(selection, tuple(Rule(c.threshold, c.k, c.density) for c in found))

    def at_density(self, fitted: Fitted, density: float, selection: str = "threshold") -> Setting:
        """The common value recall with which the layers' mean density is at most `density` on the calibration text."""
        low, high = 0.0, 1.0
        best: Setting | None = None
        for _ in range(STEPS):
            middle = (low + high) / 2
            found = self.at_recall(fitted, middle, selection)
            if found.density <= density:
                low, best = middle, found
            else:
                high = middle
        return best or self.at_recall(fitted, 1e-6, selection)

    def run(self, fitted: Fitted, setting: Setting) -> Outcome:
        def chosen(layer: int, x: np.ndarray) -> np.ndarray:
            at = setting.layers[layer]
            return select(fitted.layers[layer](x), setting.selection, at.threshold, at.k)

        return self.judge.run(chosen)


def row(fitted: Fitted, what: str, goal: float, setting: Setting, outcome: Outcome) -> dict[str, Any]:
    counts = outcome.counts
    return {
        "predictor": fitted.name,
        "predictor_share": fitted.share,
        "trained": fitted.trained,
        "selection": setting.selection,
        "target": what,
        "goal": goal,
        "density": counts.density,
        "true_density": counts.true_density,
        "of_true": counts.density / counts.true_density if counts.true_density else None,
        "recall": counts.recall,
        "precision": counts.precision,
        "value_recall": outcome.value_recall,
        "perplexity_change_percent": outcome.change,
        "kl": outcome.kl,
        "standard_error": outcome.error,
        "density_per_layer": [layer.density for layer in outcome.per_layer],
    }


def frontier(bench: Bench, every: Sequence[Fitted], shares: Sequence[float]) -> list[dict[str, Any]]:
    rows = []
    for fitted in every:
        for share in shares:
            setting = bench.at_density(fitted, share * bench.true_density)
            rows.append(row(fitted, "density_ratio", share, setting, bench.run(fitted, setting)))
            show(rows[-1])
    return rows


def targets(bench: Bench, every: Sequence[Fitted]) -> list[dict[str, Any]]:
    rows = []
    for fitted in every:
        for goal in RECALLS:
            setting = bench.at_recall(fitted, goal)
            rows.append(row(fitted, "value_recall", goal, setting, bench.run(fitted, setting)))
            show(rows[-1])
    return rows


def rules(bench: Bench, fitted: Fitted) -> list[dict[str, Any]]:
    """Top-k or threshold: the same scores under each rule, at the same mean densities."""
    rows = []
    for share in (0.65, 1.0, 1.5):
        for selection in ("threshold", "topk", "topk_and_threshold"):
            setting = bench.at_density(fitted, share * bench.true_density, selection)
            rows.append(row(fitted, "density_ratio", share, setting, bench.run(fitted, setting)))
            show(rows[-1])
    return rows


def show(r: dict[str, Any]) -> None:
    print(
        f"{r['predictor']:<44} {100 * r['predictor_share']:6.2f} %  {r['selection']:<18} {r['target']} {r['goal']:<5g} "
        f"density {100 * r['density']:5.1f} % ({r['of_true'] or 0:4.2f} of true)  recall {100 * r['recall']:5.1f} %  "
        f"value {100 * r['value_recall']:5.1f} %  perplexity {r['perplexity_change_percent']:+8.2f} % "
        f"(s.e. {r['standard_error']:.2f})  "
        f"KL {r['kl']:.2e}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.predictors", description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint directory or pack")
    parser.add_argument("--calibrate", type=Path, required=True, help="text to fit and calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="other text, to judge on")
    parser.add_argument("--out", type=Path, required=True, help="directory for the pictures and figures")
    parser.add_argument("--label", default="", help="name of the model in the pictures")
    parser.add_argument("--fit-tokens", type=int, default=16384, help="calibration tokens")
    parser.add_argument("--sample", type=int, default=2048, help="of which thresholds and training see this many")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens judged")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--epochs", type=int, default=20, help="of Deja Vu's training; 0: no trained predictors")
    parser.add_argument("--draw", choices=sorted(draw.MEASURES), default="perplexity", help="what the picture shows")
    parser.add_argument("--only-default", action="store_true", help="the default predictor alone")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if file_sha256(args.calibrate) == file_sha256(args.text):
        raise SystemExit(f"{args.text}: the text to judge on is the calibration text; give another")
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with open_model(args.checkpoint) as model:
        windows = text_windows(model, args.calibrate, args.fit_tokens, args.window)
        data = collect(model, windows, args.sample)
        judge = Judge(model, text_windows(model, args.text, args.tokens, args.window))
        bench = Bench(model, data, judge)
        densities = " ".join(f"{100 * layer.density:.1f}" for layer in data)
        print(f"dense perplexity {np.exp(judge.dense.mean()):.3f}; true density per layer {densities} %", flush=True)
        usual = default_copy(model, data)
        in_order = collect(model, windows[: max(1, args.sample // args.window)], args.sample)  # hints need neighbours
        every = [usual] if args.only_default else list(fits(model, data, args.ranks, args.epochs))
        result = {
            "model": args.label or str(Path(args.checkpoint).name),
            "dense_perplexity": float(np.exp(judge.dense.mean())),
            "tokens": len(judge.dense),
            "true_density_per_layer": [layer.density for layer in data],
            "frontier": frontier(bench, every, SHARES),
            "targets": targets(bench, [usual]),
            "rules": rules(bench, usual),
            "hints": [] if args.only_default else measure_hints(model, in_order, bench.at_recall(usual, 0.98), usual),
        }
    (args.out / "frontier.json").write_text(json.dumps(result, indent=1) + "\n")
    draw.frontier(result, args.out / "frontier.png", args.draw)
    print(f"{time.monotonic() - began:.0f} s; wrote {args.out / 'frontier.json'} and frontier.png")


if __name__ == "__main__":
    main()
