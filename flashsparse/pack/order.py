"""The order of a pack's records: what it was chosen by, and which neuron of the source each record is.

A pack in source order says nothing of it. Running a pack needs none of this: gate rows, predictors and records are all
in the pack's own order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flashsparse.errors import PackError
from flashsparse.pack.safetensors import read_header, read_tensor

if TYPE_CHECKING:
    from flashsparse.pack.checks import Node
    from flashsparse.pack.manifest import Manifest

ORDER = "order.safetensors"
TENSOR = "order"  # I32 [layers, I]: record r of layer i is neuron order[i, r] of the source
KINDS = ("frequency", "coactivation", "random")


@dataclass(frozen=True)
class OrderSpec:
    """How records were ordered: `seed` for random, else None; `texts` (SHA-256) and `tokens` for what was measured."""

    kind: str
    seed: int | None = None
    texts: tuple[str, ...] = ()
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "seed": self.seed, "texts": list(self.texts), "tokens": self.tokens}


def read_order_spec(node: Node) -> OrderSpec:
    """The manifest's object. Raises PackError for fields that do not agree."""
    kind = node.choice("kind", KINDS)
    seed = None if node.null("seed") else node.integer("seed", 0)
    texts, tokens = node.sha256_set("texts"), node.integer("tokens", 0)
    random = kind == "random"
    if (seed is not None) != random:
        node.fail("seed", seed, "an integer for random, null for every other kind")
    if bool(texts) == random or bool(tokens) == random:
        node.fail("texts", [*texts], f"{'no text' if random else 'texts'} and tokens of them for {kind}")
    return node.finish(OrderSpec(kind, seed, texts, tokens))


def read_orders(manifest: Manifest) -> npt.NDArray[np.int32] | None:
    """int32 [layers, I], None in source order. Raises PackError when a layer's is not each neuron once."""
    if manifest.order is None:
        return None
    path = manifest.path / ORDER
    header = read_header(path, PackError)
    shape = (manifest.layers, manifest.intermediate_size)
    found = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    if found != {TENSOR: ("I32", shape)}:
        raise PackError(f"{path}: found {found}, expected one tensor {TENSOR!r}, I32 {shape}")
    orders = read_tensor(header, TENSOR)
    for layer, order in enumerate(orders):
        if not np.array_equal(np.sort(order), np.arange(shape[1])):
            raise PackError(f"{path}: layer {layer}: expected each of {shape[1]} neurons once; convert again")
    return orders
