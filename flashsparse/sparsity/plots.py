"""Figures of sparsity: activation ratio per layer, ratio against perplexity, and what a calibration recorded.

Owns the drawing; numbers come in as plain sequences. Needs matplotlib (the `plot` extra), which is imported here late.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashsparse.errors import UsageError

INK, GRID = "#1f2933", "#e4e7eb"
COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#718096")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":", "-.")
SHOWN_LAYERS = 6  # lines in a figure of one curve per layer
PPL_FLOOR = 1e-3  # per cent, the least rise a logarithmic axis shows


@dataclass(frozen=True)
class Curve:
    """One metric on one model: (activation ratio, perplexity ratio) points in any order."""

    label: str
    metric: str
    points: tuple[tuple[float, float], ...]


def draw_layers(path: str | os.PathLike[str], series: Sequence[tuple[str, Sequence[float]]], title: str) -> None:
    """Bars of activation ratio per layer, side by side for each (label, ratios) of the series."""
    figure, ax = _figure(1)
    _bars(ax[0], series)
    _save(figure, path, title)


def draw_frontiers(
    path: str | os.PathLike[str],
    curves: Sequence[Curve],
    title: str,
    layers: Sequence[tuple[str, Sequence[float]]] = (),
) -> None:
    """Perplexity rise against activation ratio, a line per curve: a colour per metric, a line style per label.

    With `layers`, (label, ratios) pairs, bars of activation ratio per layer beside it.
    """
    figure, ax = _figure(2 if layers else 1)
    _frontiers(ax[0], curves)
    if layers:
        _bars(ax[1], layers)
    _save(figure, path, title)


def draw_statistics(path: str | os.PathLike[str], statistics: dict[str, Any], title: str) -> None:
    """A calibration's statistics in four panels.

    `frequency`: per layer, the share of tokens each neuron is active in [L, I]; `lags` and `persistence` [L, lags];
    `output_norms` and `residual_norms` [L] or None; `similarity` [L - 1] or None: cosine of a layer's input and the
    next one's; `head_norms` [L, H] or None.
    """
    figure, ax = _figure(4)
    _frequency(ax[0], np.asarray(statistics["frequency"]))
    _persistence(ax[1], statistics["lags"], np.asarray(statistics["persistence"]))
    _norms(ax[2], statistics)
    _similarity(ax[3], statistics)
    _save(figure, path, title)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'flashsparse[plot]'") from None
    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(6.2 * columns, 4.2 * rows), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, n + 1) for n in range(panels)]
    for one in axes:
        one.grid(color=GRID, linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str], title: str) -> None:
    figure.suptitle(title, fontsize=12, color=INK)
    # Without Software and date, equal numbers make equal files.
    figure.savefig(Path(path), format=Path(path).suffix[1:] or "png", metadata=_metadata(Path(path)))


def _metadata(path: Path) -> dict[str, None]:
    return {"Software": None} if path.suffix.lower() == ".png" else {}


def _bars(ax: Any, series: Sequence[tuple[str, Sequence[float]]]) -> None:
    width = 0.8 / max(1, len(series))
    for n, (label, ratios) in enumerate(series):
        at = np.arange(len(ratios)) + (n - (len(series) - 1) / 2) * width
        mean = 100 * float(np.mean(ratios))
        ax.bar(
            at, 100 * np.asarray(ratios), width * 0.92, color=COLORS[n % len(COLORS)], label=f"{label}: {mean:.1f} %"
        )
    ax.grid(axis="x", visible=False)
    count = max((len(ratios) for _, ratios in series), default=0)
    ax.set_xticks(range(0, count, max(1, count // 16)))
    ax.set(xlabel="layer", ylabel="active neurons (% of the layer)")
    ax.set_title("Per layer, and the mean", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _frontiers(ax: Any, curves: Sequence[Curve]) -> None:
    metrics, labels = (list(dict.fromkeys(getattr(c, name) for c in curves)) for name in ("metric", "label"))
    several = len(labels) > 1
    for curve in curves:
        n, m = metrics.index(curve.metric), labels.index(curve.label)
        points = sorted((100 * ratio, max(PPL_FLOOR, 100 * (ppl - 1))) for ratio, ppl in curve.points)
        name = f"{curve.label}, {curve.metric}" if several else curve.metric
        x, y = zip(*points, strict=True)
        style = {"color": COLORS[n % len(COLORS)], "linestyle": LINES[m % len(LINES)]}
        ax.plot(x, y, marker=MARKERS[m % len(MARKERS)], markersize=4, linewidth=1.6, label=name, **style)
    ax.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    ax.annotate("+1 %", (1, 1), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=INK)
    ax.set_yscale("log")
    ax.set_xlim(left=0)
    ax.set(xlabel="activation ratio (% of neurons, mean over layers and tokens)", ylabel="perplexity above dense (%)")
    ax.set_title("Left and down is better", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _chosen(layers: int) -> list[int]:
    """Layers to draw: all, or a few from the first to the last."""
    return sorted({round(n) for n in np.linspace(0, layers - 1, min(layers, SHOWN_LAYERS))})


def _frequency(ax: Any, frequency: np.ndarray) -> None:
    for n, layer in enumerate(_chosen(len(frequency))):
        values = 100 * np.sort(frequency[layer])[::-1]
        share = 100 * (np.arange(len(values)) + 0.5) / len(values)
        ax.plot(share, values, color=COLORS[n % len(COLORS)], linewidth=1.4, label=f"layer {layer}")
    ax.set(xlabel="neurons, most active first (%)", ylabel="tokens in which it is active (%)")
    ax.set_title("Activation frequency", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _persistence(ax: Any, lags: Sequence[int], persistence: np.ndarray) -> None:
    for n, layer in enumerate(_chosen(len(persistence))):
        ax.plot(lags, 100 * persistence[layer], marker="o", markersize=4, color=COLORS[n % len(COLORS)], linewidth=1.4)
    ax.plot(lags, 100 * persistence.mean(axis=0), color=INK, linewidth=2.2, label="mean of all layers")
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(lags), [str(lag) for lag in lags])
    ax.set_ylim(0, 100)
    ax.set(xlabel="window (tokens)", ylabel="of a token's neurons, active in the window (%)")
    ax.set_title("Persistence", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _norms(ax: Any, statistics: dict[str, Any]) -> None:
    for n, (key, label) in enumerate((("output_norms", "FFN output"), ("residual_norms", "residual entering"))):
        if statistics.get(key) is not None:
            ax.plot(statistics[key], marker=MARKERS[n], markersize=4, color=COLORS[n], label=label)
    heads = statistics.get("head_norms")
    if heads is not None:
        at = np.repeat(np.arange(len(heads)), len(heads[0]))
        ax.scatter(at, np.asarray(heads).reshape(-1), s=10, color=COLORS[2], alpha=0.6, label="attention heads")
    ax.set_yscale("log")
    ax.set(xlabel="layer", ylabel="mean norm over tokens")
    ax.set_title("Norms", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _similarity(ax: Any, statistics: dict[str, Any]) -> None:
    similarity = statistics.get("similarity")
    if similarity is not None:
        ax.plot(similarity, marker="o", markersize=4, color=COLORS[0])
    ax.set_ylim(top=1.02)
    ax.set(xlabel="layer", ylabel="cosine")
    ax.set_title("Similarity of a layer's input and the next one's", fontsize=10, color=INK)
