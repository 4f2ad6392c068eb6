"""The picture of a device curve: throughput against the size of a read, a line for each number in flight."""

from __future__ import annotations

import os
from typing import Any

from flashsparse.flash.curve import DEPTHS, SIZES, Curve, Rates
from flashsparse.sparsity.plots import COLORS, MARKERS, new_figure, save_figure


def draw_curve(path: str | os.PathLike[str], curve: Curve, record_bytes: int | None = None) -> None:
    """Direct and buffered reads beside each other. `check_plot` the path first. Raises OSError."""
    tables = [(name, rates) for name, rates in (("direct", curve.direct), ("buffered", curve.buffered)) if rates]
    figure, axes = new_figure(len(tables))
    for ax, (name, rates) in zip(axes, tables, strict=True):
        _panel(ax, name, rates, curve.sequential, record_bytes)
    save_figure(figure, path, f"Random reads, {curve.device}")


def _panel(ax: Any, name: str, rates: Rates, sequential: float, record_bytes: int | None) -> None:
    sizes = [size / 1024 for size in SIZES]
    for index, depth in enumerate(DEPTHS):
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        ax.plot(sizes, [row[index] / 1e9 for row in rates], label=f"{depth} in flight", **style)
    ax.axhline(sequential / 1e9, color=COLORS[5], linewidth=0.8, linestyle="--", label="in order")
    if record_bytes is not None:
        ax.axvline(record_bytes / 1024, color=COLORS[3], linewidth=0.8, linestyle=":", label="one record")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ax.set_ylim(bottom=0)
    ax.set(xlabel="size of a read (KiB)", ylabel="GB/s", title=name)
    ax.legend(fontsize=8, frameon=False)
