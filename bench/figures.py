"""Pictures of what other programs measured: `python -m bench.figures OUT.png RESULT...`, a panel for each RESULT.

A RESULT is a file whose last line is the JSON object that `bench.decode` (its rungs, as bars) or `bench.scaling` (a
line against size, budget, density or context) printed. Needs matplotlib. Measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import mean_deviation

UNITS = {
    "size": ("weights (billions)", 1e9), "budget": ("budget (GB)", 1e9), "density": ("share of neurons", 1),
    "context": ("prompt (tokens)", 1),
}  # fmt: skip
COLUMNS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the picture, PNG")
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        draw(args.out, [load(path) for path in args.results])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def load(path: Path) -> dict[str, Any]:
    """The last line of a program's output. Raises OSError, and ValueError for anything but the two programs'."""
    lines = path.read_text().strip().splitlines()
    try:
        result = json.loads(lines[-1]) if lines else None
    except ValueError:
        result = None
    if not isinstance(result, dict) or not ({"against", "points"} <= result.keys() or "results" in result):
        raise ValueError(
            f"{path}: the last line is not what bench.decode or bench.scaling prints; run one of them again"
        )
    return result


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    """One panel for each result, two in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.5 * rows), layout="constrained", squeeze=False)
    for panel in axes.flat[len(results) :]:
        panel.set_axis_off()
    for panel, result in zip(axes.flat, results, strict=False):
        (scaling if "against" in result else rungs)(panel, result)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def scaling(axes: Any, result: dict[str, Any]) -> None:
    """Tokens per second with deviations, and the limit."""
    label, unit = UNITS[result["against"]]
    points = result["points"]
    x = [point["x"] / unit for point in points]
    found = [mean_deviation(point["decode_tps"]) for point in points]
    axes.errorbar(x, [mean for mean, _ in found], [deviation for _, deviation in found], marker="o", label="measured")
    axes.plot(x, [point["limit_tps"] for point in points], "--", label="limit of drive and memory")
    axes.set(xlabel=label, ylabel="decode, tokens/s", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()


def rungs(axes: Any, result: dict[str, Any]) -> None:
    """A bar for each rung that ran, first at the top, with its tokens per second written beside it."""
    done = [one for one in result["results"] if "failed" not in one]
    names = [one["rung"] for one in done]
    means = [mean_deviation(one["decode_tps"])[0] for one in done]
    bars = axes.barh(range(len(done)), means, log=True)
    axes.bar_label(bars, [f" {mean:.3g}" for mean in means])
    axes.set(
        xlabel="decode, tokens/s", yticks=range(len(done)), yticklabels=names, xlim=(min(means) / 3, 3 * max(means))
    )
    axes.invert_yaxis()


if __name__ == "__main__":
    sys.exit(main())
