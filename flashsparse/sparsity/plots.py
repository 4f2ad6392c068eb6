"""Figures of sparsity: activation ratio per layer, ratio against perplexity, and what a calibration recorded.

Owns the drawing; numbers come in as plain sequences. Needs matplotlib (the `plot` extra), which is imported late.
`check_plot` says beforehand whether a figure can be drawn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.errors import UsageError

if TYPE_CHECKING:
    from flashsparse.sparsity.calibration import Calibration

INK, GRID = "#1f2933", "#e4e7eb"
COLORS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#6b46c1", "#718096")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":", "-.")
SHOWN_LAYERS = 6  # lines in a figure of one curve per layer
UNDATED = {".png": "Software", ".pdf": "CreationDate", ".svg": "Date"}  # suffix -> what metadata leaves out
PPL_FLOOR = 0.01  # per cent, the least rise that the logarithmic axis shows; lower ones lie on it


@dataclass(frozen=True)
class Curve:
    """One metric on one model: (activation ratio, perplexity ratio) points in any order."""

    label: str
    metric: str
    points: tuple[tuple[float, float], ...]


def draw_layers(path: str | os.PathLike[str], series: Sequence[tuple[str, Sequence[float]]], title: str) -> None:
    """Bars of activation ratio per layer, side by side for each (label, ratios) of the series."""
    figure, ax = new_figure(1)
    _bars(ax[0], series)
    save_figure(figure, path, title)


def draw_frontiers(
    path: str | os.PathLike[str],
    curves: Sequence[Curve],
    title: str,
    layers: Sequence[tuple[str, Sequence[float]]] = (),
) -> None:
    """Perplexity rise against activation ratio, a line per curve: a colour per metric, a line style per label.

    With `layers`, (label, ratios) pairs, bars of activation ratio per layer beside it.
    """
    figure, ax = new_figure(2 if layers else 1)
    _frontiers(ax[0], curves)
    if layers:
        _bars(ax[1], layers)
    save_figure(figure, path, title)


def draw_statistics(path: str | os.PathLike[str], calibration: Calibration, title: str) -> None:
    """A calibration in four panels: activation frequency, persistence, norms, similarity of hidden states.

    What needs active sets is left out where the calibration has none (silu without a threshold).
    """
    layers = range(calibration.layers)

    def stacked(name: str) -> np.ndarray | None:
        found = [calibration.tensor(layer, name) for layer in layers]
        return None if any(one is None for one in found) else np.array(found)

    frequency, persistence, union = (stacked(name) for name in ("frequency", "persistence", "union"))
    figure, ax = new_figure(2 if frequency is None else 4)
    _norms(ax[-2], stacked("ffn_norm"), stacked("head_norm_mean"))
    _similarity(ax[-1], stacked("similarity"))
    if frequency is not None:
        _frequency(ax[0], frequency)
        _persistence(ax[1], calibration.description["lookbacks"], persistence, union)
    save_figure(figure, path, title)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raises UsageError when a figure could not be drawn to `path`: before the work, not after it."""
    if Path(path).suffix.lower() not in UNDATED:
        raise UsageError(f"{path}: expected a name that ends in {', '.join(UNDATED)}")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"{path}: {Path(path).parent} is no directory")
    if find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib: pip install matplotlib")


def new_figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure and its axes, in this project's style; `check_plot` says beforehand whether matplotlib is there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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


def save_figure(figure: Any, path: str | os.PathLike[str], title: str) -> None:
    """Write the figure; equal figures make equal files."""
    figure.suptitle(title, fontsize=12, color=INK)
    figure.savefig(Path(path), metadata={UNDATED[Path(path).suffix.lower()]: None})


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
    ax.set_ylim(top=ax.get_ylim()[1] * (1.04 + 0.06 * len(series)))  # the legend above the bars
    ax.legend(fontsize=8, frameon=False, loc="upper left")


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
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(bottom=0.8 * PPL_FLOOR)
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


def _persistence(ax: Any, lookbacks: Sequence[int], persistence: np.ndarray | None, union: np.ndarray | None) -> None:
    """Both [L, lookbacks]."""
    if persistence is not None:
        for n, layer in enumerate(_chosen(len(persistence))):
            color = COLORS[n % len(COLORS)]
            ax.plot(lookbacks, 100 * persistence[layer], marker="o", markersize=4, color=color, linewidth=1.4)
        ax.plot(
            lookbacks, 100 * persistence.mean(axis=0), color=INK, linewidth=2.4, label="active again, mean of layers"
        )
    if union is not None:
        mean = 100 * union.mean(axis=0)
        ax.plot(lookbacks, mean, color=INK, linewidth=1.6, linestyle="--", label="layer in the window, mean of layers")
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(lookbacks), [str(k) for k in lookbacks])
    ax.set_ylim(0, 100)
    ax.set(xlabel="window (tokens)", ylabel="% of the token's neurons, of the layer's")
    ax.set_title("Persistence: active in the window too; and the window's share", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _norms(ax: Any, ffn: np.ndarray | None, heads: np.ndarray | None) -> None:
    """ffn [L, 2]: mean and standard deviation; heads [L, H]."""
    if ffn is not None:
        at = np.arange(len(ffn))
        ax.errorbar(at, ffn[:, 0], ffn[:, 1], marker="o", markersize=4, capsize=3, color=COLORS[0], label="FFN output")
    if heads is not None:
        at = np.repeat(np.arange(len(heads)), heads.shape[1])
        ax.scatter(at, heads.reshape(-1), s=14, color=COLORS[1], alpha=0.7, zorder=3, label="attention heads, each")
    ax.set_ylim(bottom=0)
    _layer_axis(ax, "L2 norm, mean over tokens (bars: std)")
    ax.set_title("Norms", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _similarity(ax: Any, similarity: np.ndarray | None) -> None:
    """[L, 2]: with the residual that leaves the layer, and with the one that the FFN reads."""
    if similarity is not None:
        for n, label in enumerate(("and the one leaving it", "and the one its FFN reads")):
            ax.plot(similarity[:, n], marker=MARKERS[n], markersize=4, color=COLORS[n], label=label)
    ax.set_ylim(top=1.02)
    _layer_axis(ax, "cosine, mean over tokens")
    ax.set_title("Similarity of the residual entering a layer ...", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)


def _layer_axis(ax: Any, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="layer", ylabel=label)
