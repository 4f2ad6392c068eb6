"""The frontier as a picture: quality against what is loaded, and against what is resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# What is drawn: the axis's text, the row's value, and where smaller values are drawn.
MEASURES = {
    "perplexity": ("perplexity change, % (log scale; 0.02 and less at the bottom)", "perplexity_change_percent", 0.02),
    "kl": ("KL to the dense model, nats (log scale; 0.00001 and less at the bottom)", "kl", 1e-5),
}


def frontier(result: dict[str, Any], path: Path, measure: str = "perplexity") -> None:
    """Left: quality against the density loaded. Right: against resident bytes, at two densities.

    `measure` is perplexity or kl, which also speaks for a model whose perplexity means nothing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 6.6), constrained_layout=True, sharey=True)
    label, key, floor = MEASURES[measure]
    names = list(dict.fromkeys(row["predictor"] for row in result["frontier"]))
    for number, name in enumerate(names):
        rows = [row for row in result["frontier"] if row["predictor"] == name]
        style = _style(name, number)
        left.plot([r["of_true"] for r in rows], [max(floor, r[key]) for r in rows], label=name, **style)
        for row in rows:
            if row["goal"] in (0.65, 1.0) and row["predictor_share"]:
                kept = {part: style[part] for part in ("color", "marker")}
                size = 55 if row["goal"] == 1.0 else 18
                right.scatter([100 * row["predictor_share"]], [max(floor, row[key])], s=size, **kept)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    left.set_xlabel("neurons loaded, relative to those truly active")
    left.set_ylabel(label)
    left.set_xlim(0.2, 1.7)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center", frameon=False)
    right.set_xlabel("predictor's bytes, % of the FFN's in 16 bits")
    right.set_title("resident cost: large marks load as many as are active, small ones 0.65 times", fontsize=9)
    active = sum(result["true_density_per_layer"]) / len(result["true_density_per_layer"])
    left.set_title(f"{result['model']}: {100 * active:.1f} % of the neurons are active", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(name: str, number: int) -> dict[str, Any]:
    """Copies solid, low-rank dashed, the oracle black; a colour of its own each."""
    import matplotlib

    if name.startswith("oracle"):
        return {"color": "black", "linestyle": ":", "marker": "", "linewidth": 1.5}
    colour = matplotlib.colormaps["tab20"](number % 20)
    copied = "cop" in name
    return {"color": colour, "linestyle": "-" if copied else "--", "marker": "o" if copied else "s", "linewidth": 1.4}
