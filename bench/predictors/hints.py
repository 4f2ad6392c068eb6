"""Prefetch hints against the default predictor's sets: needed neurons that they name, and reads in vain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.predictors.data import LayerData
from bench.predictors.fits import Fitted
from converter.model import Model
from converter.predictors.lookahead import fit_hint, hold_out, measure_hint, window_sets
from flashsparse.sparsity.selection import select

RANK, GOAL, WINDOW = 32, 0.9, 4


def measure_hints(model: Model, data: Sequence[LayerData], setting: Any, fitted: Fitted) -> list[dict[str, Any]]:
    """One row per source and layer, on the last tenth of `data`, which has every token of its windows in order."""
    sets = [
        select(scorer(layer.x), setting.selection, at.threshold, at.k)
        for scorer, layer, at in zip(fitted.layers, data, setting.layers, strict=True)
    ]
    fit, held = hold_out(len(sets[0]))
    rank = min(RANK, model.hidden_size)
    rows = []
    for index, layer in enumerate(data):
        resident = window_sets(sets[index][held], WINDOW)
        for source, states in _sources(data, index):
            hint = fit_hint(source, states[fit], layer.gate[fit], sets[index][fit], rank, GOAL)
            hinted = hint.hinted(states[held])
            rows.append(_row(index, source, hinted, sets[index][held], None))
            rows.append(_row(index, source, hinted, sets[index][held], resident))
    return rows


def _sources(data: Sequence[LayerData], index: int) -> list[tuple[str, np.ndarray]]:
    """What is known before layer `index` has its FFN input."""
    found = [("before", data[index].before)]
    if index:
        found.append(("next", data[index - 1].x))
    if index > 1:
        found.append(("plan", data[1].before))  # the state that leaves the first layer
    return found


def _row(
    layer: int, source: str, hinted: np.ndarray, selected: np.ndarray, resident: np.ndarray | None
) -> dict[str, Any]:
    counts = measure_hint(hinted, selected, resident)
    width = selected.shape[1]
    print(
        f"layer {layer} hint {source:<7}{'with the window ' if resident is not None else '':<16} covers "
        f"{100 * counts.coverage:5.1f} % of {100 * selected.mean():.1f} %, reads "
        f"{100 * counts.reads_per_token / width:5.1f} %, "
        f"in vain {100 * counts.extra_per_token / width:5.1f} % of the layer per token",
        flush=True,
    )
    return {
        "layer": layer,
        "source": source,
        "window": 0 if resident is None else WINDOW,
        "coverage": counts.coverage,
        "selected": float(selected.mean()),
        "reads": counts.reads_per_token / width,
        "extra": counts.extra_per_token / width,
    }
