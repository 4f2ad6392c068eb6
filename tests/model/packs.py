"""Packs for whole-model tests: tiny random checkpoints, converted once per test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.checkpoints import write_checkpoint

SHAPE: dict[str, Any] = {"hidden": 64, "intermediate": 512, "layers": 3, "heads": 4, "kv_heads": 2, "vocab": 160}


def make_pack(
    root: Path, name: str = "pack", *, bits: int = 16, tier: str = "auto", gate: str = "full", **checkpoint: Any
) -> Path:
    """A pack converted from a random checkpoint of SHAPE, with the given differences."""
    from converter.convert import convert

    source = root / f"{name}-source"
    source.mkdir(parents=True, exist_ok=True)
    write_checkpoint(source, **{**SHAPE, "dtype": "F16", **checkpoint})
    return convert(source, root / name, bits=bits, tier=tier, gate=gate)
