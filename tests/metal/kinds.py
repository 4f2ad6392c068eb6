"""One tiny pack of every kind that the engine runs on Metal, and what it computes; for the quick and the slow tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import flashsparse
from flashsparse.sparsity.spec import LayerSpec
from flashsparse.stats import Counters
from tests.checkpoints import write_checkpoint
from tests.model.packs import make_pack
from tests.model.predict_packs import default_layer, make_predict_pack
from tests.vector_files import TOLERANCE

PROMPT = [5, 17, 99, 3, 42, 8, 120, 77, 13, 64, 31]
DECODED = [7, 90, 22, 51]
SHAPE: dict[str, Any] = {"hidden": 64, "intermediate": 224, "layers": 3, "heads": 4, "kv_heads": 2, "vocab": 128}

GPU_TOLERANCE = 3e-2
Maker = Callable[[Path], Path]


def converted(family: str = "llama", gate: str = "full", bits: int = 16, **checkpoint: Any) -> Maker:
    """`activation` beyond the checkpoint's own names is given to the converter."""
    from converter.convert import convert

    activation = checkpoint.pop("given", None)

    def make(root: Path) -> Path:
        source = write_checkpoint(root / "source", family, **{**SHAPE, "dtype": "F16", **checkpoint})
        return convert(source, root / "pack", gate=gate, bits=bits, activation=activation)

    return make


def predicted(**options: Any) -> Maker:
    return lambda root: make_predict_pack(root, **{"intermediate": 224, "vocab": 128, **options})


KINDS: dict[str, Maker] = {
    "exact": converted(),
    "exact-bf16": converted(dtype="BF16"),
    "exact-f32": converted(dtype="F32"),
    "exact-q4": converted(bits=4),
    "exact-q8": converted(bits=8),
    "compact": converted(gate="compact"),
    "compact-fatrelu": converted(gate="compact", given="fatrelu:0.02"),
    "relu2-bias": converted(given="relu2", mlp_bias=True),
    "drelu": converted("bamboo", given="drelu"),
    "opt": converted("opt", tie=True),
    "qwen2": converted("qwen2", tie=True),
    "minicpm": converted("minicpm", heads=8),
    "window": converted("mistral", sliding_window=6),
    "dense": lambda root: make_pack(root, activation="silu", tier="dense", intermediate=224, vocab=128),
    "gate-copy": predicted(),
    "gate-copy-topk": predicted(selection="topk_and_threshold", layer=replace(default_layer("gate_copy"), k=60)),
    "gate-copy-3-bits": predicted(layer=replace(default_layer("gate_copy"), bits=3)),
    "gate-up-copy": predicted(score="gate_up_copy"),
    "low-rank": predicted(score="low_rank"),
    "resident-gate": predicted(score="gate"),
    "whole-layer": predicted(layers={1: LayerSpec(every=True)}),
}


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether logits [T, V] are the same but for rounding.

    Where a value is rounded, to 16 bits in a KV cache or to a whole number for a predictor's score, one on the
    edge may fall to the other side, and a neuron at the threshold with it: a few tokens then differ more.
    """
    errors = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    on_gpu = mx.default_device().type == mx.DeviceType.gpu  # products take 16-bit inputs there
    return bool(np.median(errors) < (GPU_TOLERANCE if on_gpu else TOLERANCE) and errors.max() < 0.1)


def run(pack: Path, **options: Any) -> tuple[np.ndarray, Counters]:
    """Logits of the prompt, fed at once, and of each token decoded after it."""
    with flashsparse.load(pack, **{"max_kv_size": 64, **options}) as engine, engine.session() as session:
        rows = [session.logits(part) for part in (PROMPT, *([token] for token in DECODED))]
        return np.concatenate(rows), engine.counters.copy()
