"""The FFN's activation functions in numpy, and which of them have exact zeros.

Offline code and its references use these; the runtime's own are native (`flashsparse/native`). NaN stays NaN, so that
bad numbers surface.
"""

from __future__ import annotations

import numpy as np


def has_zeros(name: str) -> bool:
    """Whether the activation is exactly zero for a whole range of inputs: all but silu."""
    return name != "silu"


def activate(name: str, param: float | None, g: np.ndarray) -> np.ndarray:
    """a = act(g) for pre-activations g of any shape, as a new array of the same type.

    `name` is relu, relu2, fatrelu (zero below `param`, which nothing else uses), drelu (relu) or silu. Raises
    ValueError for any other name.
    """
    if name in ("relu", "drelu"):
        return np.maximum(g, 0)
    if name == "relu2":
        return np.square(np.maximum(g, 0))
    if name == "fatrelu":
        return np.where(g < (param or 0.0), g.dtype.type(0), g)
    if name == "silu":
        with np.errstate(over="ignore"):  # exp(-g) is infinite where silu(g) rounds to zero anyway
            return g / (1 + np.exp(-g))
    raise ValueError(f"unknown activation {name!r}")


def intermediate(name: str, param: float | None, g: np.ndarray, up: np.ndarray | None) -> np.ndarray:
    """h, what the down projection is multiplied with: act(g) * up, relu(g) * relu(up) for drelu, act(g) without up."""
    a = activate(name, param, g)
    if up is None:
        return a
    a *= np.maximum(up, 0) if name == "drelu" else up
    return a


def active(name: str, param: float | None, g: np.ndarray) -> np.ndarray:
    """The truly active neurons as bool: act(g) != 0. drelu asks its gate alone, whatever up is."""
    return activate(name, param, g) != 0
