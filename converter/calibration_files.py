"""The files of a calibration: each finished layer's results, and the two that are published from them.

Owns the names of tensors, what the description says of them, and the order in which files come into place.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from converter.disk import OutputFile, sync_directory
from converter.states import write_file
from converter.statistics import LOOKBACKS
from flashsparse.errors import ConvertError
from flashsparse.pack.layout import FileDigest
from flashsparse.pack.safetensors import Header, header_bytes, read_header, read_tensor, storage_order
from flashsparse.sparsity.calibration import DESCRIPTION, FORMAT, TENSORS, VERSION

_TYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "uint32": "U32", "uint8": "U8"}

MEANINGS = {
    "frequency": "[I] share of tokens on which a neuron is active",
    "persistence": "[6] share of a token's active neurons that were active in one of the k tokens before it, k as in "
    "lookbacks, within a window",
    "union": "[6] share of neurons that are active in one of k consecutive tokens, mean",
    "jaccard": "[1] neighbouring tokens' sets: in both over in either, mean",
    "coactivation_ids": "[n] the most frequently active neurons, at most 256",
    "coactivation": "[n, n] sampled tokens (at most 2048, evenly spread) on which both are active",
    "value_mean": "[I] mean of |h_i| * norm of down column i",
    "value_std": "[I] its standard deviation",
    "ffn_norm": "[2] mean and standard deviation of the norm of the FFN's output",
    "head_norm_mean": "[H] mean norm of a head's attention output, before the output projection",
    "head_norm_std": "[H] its standard deviation",
    "similarity": "[2] mean cosine of the residual entering the layer with the one leaving it, and with the one that "
    "the FFN reads",
    "x_mean": "[d] mean of x, the FFN's input after its norm",
    "x_square": "[d] mean of x^2",
    "x_second_moment": "[d, d] mean of x x^T",
    "order": "[I] the neuron that each record will be, by `convert --order`",
}


def write_layer(partial: Path, layer: int, found: dict[str, np.ndarray]) -> None:
    """Keeps the results of a finished layer: there whole or not at all."""
    tensors = {f"layers.{layer}.{name}": values for name, values in found.items()}
    stored = {name: (_TYPES[values.dtype.name], values.shape) for name, values in tensors.items()}
    order = storage_order(stored)
    head = header_bytes({name: stored[name] for name in order})
    write_file(layer_path(partial, layer), head + b"".join(tensors[name].tobytes() for name in order))


def publish(partial: Path, directory: Path, layers: int, facts: dict[str, Any]) -> None:
    """Both files into place; the description last, and gone while the tensors of another may be there.

    `facts` is the description's part that does not follow from the results. Raises ConvertError for a missing layer.
    """
    sources = [_read_layer(partial, layer) for layer in range(layers)]
    stored = {info.name: (info.dtype, info.shape) for header in sources for info in header.tensors.values()}
    owner = {name: header for header in sources for name in header.tensors}
    order = storage_order(stored)
    with OutputFile(partial / TENSORS, FileDigest()) as file:
        file.write(header_bytes({name: stored[name] for name in order}))
        for name in order:
            file.write(read_tensor(owner[name], name).tobytes())
        entry = file.finish()
    (directory / DESCRIPTION).unlink(missing_ok=True)
    sync_directory(directory)
    os.replace(partial / TENSORS, directory / TENSORS)
    description = {"format": FORMAT, "version": VERSION, **facts, **_results(sources), "tensors_sha256": entry.sha256}
    write_file(directory / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def layer_path(partial: Path, layer: int) -> Path:
    return partial / f"layer-{layer:03d}.safetensors"


def _read_layer(partial: Path, layer: int) -> Header:
    path = layer_path(partial, layer)
    if not path.is_file():
        raise ConvertError(f"{path}: missing, expected the results of this layer; use --force to start over")
    return read_header(path)


def _results(sources: list[Header]) -> dict[str, Any]:
    """What the description says of the tensors and of each layer."""
    names = {name.split(".", 2)[2]: info for name, info in sources[0].tensors.items()}
    tensors = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "meaning": MEANINGS.get(name)}
        for name, info in sorted(names.items())
    }
    summaries = [_summary(layer, header) for layer, header in enumerate(sources)]
    return {"lookbacks": list(LOOKBACKS), "tensors": tensors, "layers": summaries}


def _summary(layer: int, header: Header) -> dict[str, Any]:
    """A layer's figures that are single numbers; null where a figure is not defined."""
    stored = {name.split(".", 2)[2]: name for name in header.tensors}
    numbers = ("frequency", "persistence", "union", "jaccard", "similarity", "ffn_norm")
    found = {name: read_tensor(header, stored[name]) for name in numbers if name in stored}
    frequency, similarity, ffn = found.get("frequency"), found["similarity"], found["ffn_norm"]
    return {
        "density": None if frequency is None else float(frequency.mean(dtype=np.float64)),
        "never_active": None if frequency is None else int((frequency == 0).sum()),
        "persistence": _by_lookback(found.get("persistence")),
        "union": _by_lookback(found.get("union")),
        "jaccard": _number(found["jaccard"][0]) if "jaccard" in found else None,
        "similarity": {"output": _number(similarity[0]), "ffn_input": _number(similarity[1])},
        "ffn_norm": {"mean": _number(ffn[0]), "std": _number(ffn[1])},
    }


def _by_lookback(values: np.ndarray | None) -> dict[str, float | None] | None:
    return None if values is None else {str(k): _number(v) for k, v in zip(LOOKBACKS, values, strict=True)}


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
