"""The picture of an evaluation: density against recall per layer, and quality against the bytes that a token loads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from flashsparse.sparsity.plots import COLORS, INK, new_figure, save_figure


def draw_quality(
    path: str | os.PathLike[str], quality: dict[str, Any], name: str, others: Sequence[tuple[str, dict[str, Any]]] = ()
) -> None:
    """Two panels of a pack's record; in the second, (name, record) of other packs measured on the same text.

    `check_plot` the path first. Raises OSError when the file cannot be written.
    """
    figure, (left, right) = new_figure(2)
    _layers(left, quality["layers"])
    _bytes(right, [(name, quality), *others])
    save_figure(figure, path, f"{name}: {quality['tokens']} tokens")


def _layers(ax: Any, layers: Sequence[dict[str, float]]) -> None:
    for index, layer in enumerate(layers):
        x, y = 100 * layer["predicted_density"], 100 * layer["recall"]
        ax.plot([100 * layer["true_density"], x], [y, y], color=COLORS[5], linewidth=0.8)
        ax.plot(100 * layer["true_density"], y, "o", color=COLORS[1], fillstyle="none", label=_once(index, "active"))
        ax.plot(x, y, "o", color=COLORS[0], label=_once(index, "loaded"))
        ax.annotate(str(index), (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8, color=INK)
    ax.margins(0.12)
    ax.ticklabel_format(useOffset=False)
    ax.set(xlabel="neurons (% of the layer)", ylabel="recall (%)")
    ax.set_title("Each layer" if layers else "Every neuron of every layer is loaded", fontsize=10, color=INK)
    if layers:
        ax.legend(fontsize=8, frameon=False)


def _once(index: int, label: str) -> str | None:
    """A legend names a series once."""
    return None if index else label


def _bytes(ax: Any, packs: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Perplexity; a pack and its own dense model are joined by a line."""
    for index, (name, quality) in enumerate(packs):
        color, dense = COLORS[index % len(COLORS)], quality["dense_perplexity"]
        x, y = quality["selected_bytes_per_token"] / 1e6, quality["perplexity"]
        ax.plot(x, y, "o", color=color, label=name)
        if dense is not None:
            whole = quality["ffn_bytes"] / 1e6
            ax.plot([x, whole], [y, dense], color=color, linewidth=0.8)
            ax.plot(whole, dense, "s", color=color, fillstyle="none", label=_once(index, "dense"))
    ax.set_xlim(left=0)
    ax.ticklabel_format(useOffset=False)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.999 * high), max(high, 1.001 * low))  # less than this is no difference
    ax.set(xlabel="FFN bytes of a token's neurons, cache or not (MB)", ylabel="perplexity")
    ax.set_title("Left and down is better", fontsize=10, color=INK)
    ax.legend(fontsize=8, frameon=False)
