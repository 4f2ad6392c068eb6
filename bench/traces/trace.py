"""A recorded run: which records each layer needed for each token. Owns the file's form and the recording.

The file is an .npz: `description` (JSON as bytes), `tokens` int32 [n], `counts` int32 [n, layers] (how many records),
and `ids`, the sets back to back, token by token and layer by layer, uint16 where the numbers fit.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flashsparse.errors import UsageError

if TYPE_CHECKING:
    from flashsparse import Engine

Ids = npt.NDArray[np.integer]
FORMAT = "flashsparse-trace-1"
SIZES = ("layers", "records", "record_bytes", "stride")


@dataclass(frozen=True)
class Trace:
    """`sets[layer][token]`: ascending record numbers. `description` says of what: pack, tier, sizes, text, windows."""

    description: dict[str, Any]
    tokens: npt.NDArray[np.int32]
    sets: list[list[Ids]]

    @property
    def records(self) -> int:
        """Records per layer."""
        return int(self.description["records"])

    @property
    def record_bytes(self) -> int:
        return int(self.description["record_bytes"])

    @property
    def density(self) -> float:
        """Mean share of a layer's records that a token needs."""
        return sum(len(ids) for layer in self.sets for ids in layer) / (
            len(self.tokens) * len(self.sets) * self.records
        )

    def save(self, path: Path) -> None:
        counts = np.array([[len(ids) for ids in layer] for layer in self.sets], np.int32).T
        ids = np.concatenate([layer[n] for n in range(len(self.tokens)) for layer in self.sets])
        narrow = ids.astype(np.uint16 if self.records <= 1 << 16 else np.int32)
        text = np.frombuffer(json.dumps(self.description, sort_keys=True).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez_compressed(file, description=text, tokens=self.tokens, counts=counts, ids=narrow)

    @staticmethod
    def load(path: Path) -> Trace:
        """Raises UsageError for a file that is no trace, or whose parts do not belong together."""
        try:
            with np.load(path) as stored:
                parts = {name: stored[name] for name in ("description", "tokens", "counts", "ids")}
            description = json.loads(parts["description"].tobytes())
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as problem:
            raise UsageError(
                f"{path}: not a trace ({problem}); make one with `python -m bench.traces record`"
            ) from None
        _check(path, description, parts)
        return Trace(description, parts["tokens"], _split(parts["counts"], parts["ids"]))


def _check(path: Path, description: dict[str, Any], parts: dict[str, npt.NDArray[Any]]) -> None:
    counts, ids = parts["counts"], parts["ids"]
    if description.get("format") != FORMAT or not all(isinstance(description.get(name), int) for name in SIZES):
        raise UsageError(f"{path}: found format {description.get('format')!r}, expected {FORMAT!r}; record it again")
    expected = (len(parts["tokens"]), description["layers"])
    if counts.shape != expected or int(counts.sum()) != len(ids) or (len(ids) and ids.max() >= description["records"]):
        raise UsageError(
            f"{path}: counts of shape {counts.shape} for {len(ids)} records, expected {expected} and numbers below "
            f"{description['records']}; the file is damaged, record it again"
        )


def _split(counts: npt.NDArray[np.int32], ids: Ids) -> list[list[Ids]]:
    flat = np.split(ids, np.cumsum(counts.ravel())[:-1])
    layers = counts.shape[1]
    return [flat[layer::layers] for layer in range(layers)]


def record(engine: Engine, windows: Sequence[Sequence[int]], source: dict[str, Any]) -> Trace:
    """Decodes each window token by token in a session of its own and keeps the sets; `source` says what the text is."""
    m = engine.manifest
    sets: list[list[Ids]] = [[] for _ in range(m.layers)]
    engine.observe(lambda layer, ids: sets[layer].append(ids.copy()))
    try:
        for window in windows:
            with engine.session() as session:
                for token in window:
                    session.logits([token])
    finally:
        engine.observe(None)
    description = {
        "format": FORMAT,
        "pack": m.digest,
        "tier": engine.tier,
        "gate": m.gate,
        "bits": m.quant.bits if m.quant else 16,
        "layers": m.layers,
        "records": m.intermediate_size,
        "record_bytes": m.record.bytes,
        "stride": m.record.stride,
        "windows": [len(window) for window in windows],
        **source,
    }
    tokens = np.array([token for window in windows for token in window], np.int32)
    return Trace(description, tokens, sets)
