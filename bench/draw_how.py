"""Draws docs/how-it-works.png: what happens in one layer for one token.

python bench/draw_how.py        (needs the `bench` extra)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, SOFT, HIT, MISS, COLD = "#1f2933", "#7b8794", "#2f855a", "#dd6b20", "#e4e7eb"
NEURONS, SLOTS = 24, 9
ACTIVE = (1, 4, 9, 13, 17, 22)
HELD = {1: 2, 9: 5, 13: 0, 17: 7, 6: 4, 20: 8, 11: 3}  # neuron -> its slot; 4 and 22 are misses
FILLED = {4: 1, 22: 6}


def box(ax: Any, x: float, y: float, width: float, height: float, title: str, note: str, color: str = "white") -> None:
    style = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=color, ec=INK, lw=1.2)
    ax.add_patch(style)
    middle = x + width / 2
    ax.text(middle, y + height - 0.28, title, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    ax.text(middle, y + (height - 0.45) / 2, note, ha="center", va="center", fontsize=9, color=INK, linespacing=1.4)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=color, lw=1.4))


def label(ax: Any, x: float, y: float, text: str, color: str = SOFT, **options: Any) -> None:
    ax.text(x, y, text, fontsize=9, color=color, va="center", **options)


def flash(ax: Any) -> None:
    """The layer's records in their order on flash; the active ones coloured."""
    width = 11.4 / NEURONS
    for neuron in range(NEURONS):
        color = (HIT if neuron in HELD else MISS) if neuron in ACTIVE else COLD
        ax.add_patch(Rectangle((0.8 + neuron * width, 0.55), width * 0.86, 0.75, fc=color, ec="white", lw=0.5))
    label(ax, 0.8, 0.28, "Flash: one file per layer, one record per neuron (its up row and its down column)", INK)


def slots(ax: Any) -> None:
    """The layer's slots in memory: what earlier tokens left, and where the misses land."""
    used = {slot: neuron for neuron, slot in (HELD | FILLED).items()}
    for slot in range(SLOTS):
        neuron = used[slot]
        color = COLD if neuron not in ACTIVE else MISS if neuron in FILLED else HIT
        x = 4.05 + slot * 0.47
        ax.add_patch(Rectangle((x, 2.55), 0.4, 0.75, fc=color, ec=INK, lw=0.8))
        ink = INK if color == COLD else "white"
        ax.text(x + 0.2, 2.92, str(neuron), ha="center", va="center", fontsize=8, color=ink)
    label(ax, 4.05, 3.52, "Slots: as many as the budget buys", INK)
    width = 11.4 / NEURONS
    for neuron, slot in FILLED.items():
        arrow(ax, (0.8 + (neuron + 0.43) * width, 1.32), (4.25 + slot * 0.47, 2.53), MISS)
    label(ax, 5.5, 1.75, "misses: parallel reads,\nonly these", MISS, ha="center")


def draw(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(10.4, 5.2), dpi=130)
    ax.set_xlim(0, 13)
    ax.set_ylim(0, 6.3)
    ax.axis("off")
    box(ax, 0.8, 4.3, 2.3, 1.5, "Attention", "resident weights,\nKV cache")
    box(ax, 4.05, 4.3, 4.2, 1.5, "Score", "relu(gate rows · x), gate rows resident:\nmost results are exactly zero")
    box(ax, 9.3, 4.3, 2.9, 1.5, "Layer output", "added to the token's\nhidden state")
    box(ax, 9.3, 2.25, 2.9, 1.35, "Sparse FFN", "up and down of the\nactive neurons alone")
    arrow(ax, (3.1, 5.05), (4.05, 5.05))
    arrow(ax, (6.15, 4.3), (6.15, 3.75))
    label(ax, 6.3, 4.04, "active: " + ", ".join(map(str, ACTIVE)), INK)
    arrow(ax, (8.35, 2.92), (9.3, 2.92))
    arrow(ax, (10.75, 3.6), (10.75, 4.3))
    slots(ax)
    flash(ax)
    for y, color, text in ((3.1, HIT, "hit: in a slot already"), (2.7, MISS, "miss: read now")):
        ax.add_patch(Rectangle((0.8, y - 0.1), 0.28, 0.2, fc=color, ec="none"))
        label(ax, 1.22, y, text, INK)
    figure.savefig(path, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).resolve().parents[1] / "docs" / "how-it-works.png")
