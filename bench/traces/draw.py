"""Hit rate against slots, one line per policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of a replay's report."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    names = list(dict.fromkeys(row["policy"] for row in report["rows"]))
    for number, name in enumerate(names):
        rows = sorted((row for row in report["rows"] if row["policy"] == name), key=lambda row: int(row["slots"]))
        style = {"color": "black", "linestyle": "--"} if name == "Belady" else {"color": f"C{number}"}
        axes.plot(
            [100 * r["share"] for r in rows], [r["hit_rate"] for r in rows], marker="o", ms=3, label=name, **style
        )
    about = report["trace"]
    axes.set_title(
        f"tier {about['tier']}, {about['layers']} layers of {about['records']} records, "
        f"{report['density']:.1%} needed per token",
        fontsize=10,
    )
    axes.set_xlabel("slots, % of the layer's records")
    axes.set_ylabel("hit rate")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
