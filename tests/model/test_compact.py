"""Gate layout compact: the bits of layout full at every budget and way of cutting a prompt; conversion, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from converter.convert import convert
from converter.gate_copy import copy_rows
from flashsparse.errors import ConvertError, PackError, UsageError
from flashsparse.pack.inspect import describe
from flashsparse.pack.manifest import Manifest, read_manifest
from flashsparse.pack.safetensors import read_header, read_tensor
from flashsparse.pack.verify import verify
from flashsparse.stats import Counters
from tests.checkpoints import write_checkpoint
from tests.model.packs import SHAPE

TOKENS = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95, 2, 88, 41, 97]
MODELS: dict[str, dict[str, Any]] = {
    "relu": {},
    "relu2-bias": {"activation": "relu2", "mlp_bias": True},
    "fatrelu": {"activation": "fatrelu:0.02"},
    "drelu": {"activation": "drelu"},
    "opt": {"family": "opt", "tie": True},
    "bf16": {"dtype": "BF16"},
    "odd": {"hidden": 72, "intermediate": 130, "heads": 3, "kv_heads": 3, "head_dim": 24},
}


def source_of(root: Path, **model: Any) -> tuple[Path, str | None]:
    model = dict(model)
    activation = model.pop("activation", None)
    family = model.pop("family", "llama")
    root.mkdir(parents=True)
    return write_checkpoint(root, family, **{**SHAPE, "dtype": "F16", "intermediate": 192, **model}), activation


@pytest.fixture(scope="module", params=list(MODELS))
def packs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp(request.param)
    source, activation = source_of(root / "source", **MODELS[request.param])
    gates = ("full", "compact")
    return {gate: convert(source, root / gate, gate=gate, activation=activation) for gate in gates}


def logits(pack: Path, steps: tuple[int, ...] = (), **options: Any) -> tuple[np.ndarray, Counters]:
    """Of TOKENS fed in the given steps, then one at a time."""
    found, at = [], 0
    with flashsparse.load(pack, **options) as engine, engine.session() as session:
        for count in (*steps, *[1] * (len(TOKENS) - sum(steps))):
            found.append(session.logits(TOKENS[at : at + count]))
            at += count
        return np.concatenate(found), engine.counters.copy()


def test_equals_the_full_layout(packs: dict[str, Path]) -> None:
    expected, exact = logits(packs["full"], (12,))
    for options in ({}, {"slots": 9, "threads": 1}, {"slots": 70, "read_mode": "buffered"}):
        found, counters = logits(packs["compact"], (12,), **options)
        assert np.array_equal(found, expected), options
        assert counters.fired <= counters.predicted < counters.scored
        assert exact.active <= counters.active < 1.2 * exact.active + 20


def test_does_not_depend_on_how_a_prompt_is_cut(packs: dict[str, Path]) -> None:
    expected, _ = logits(packs["compact"], (20,))
    for steps in ((), (1, 7, 12)):
        assert np.array_equal(logits(packs["compact"], steps)[0], expected)


def test_reference_kernels_agree(packs: dict[str, Path]) -> None:
    expected, _ = logits(packs["full"], (16,))
    found, _ = logits(packs["compact"], (16,), kernels="reference")
    # Sums in another order may round a cached key, or fall on a threshold's side, the other way; a lost neuron is 1e-1.
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_judging_changes_nothing_and_finds_every_active_neuron(packs: dict[str, Path]) -> None:
    seen = []
    with flashsparse.load(packs["compact"]) as engine, engine.session() as session:
        engine.judge(seen.append)
        found = session.logits(TOKENS)
    assert np.array_equal(found, logits(packs["full"], (20,))[0])
    with flashsparse.load(packs["full"]) as engine, engine.session() as session:
        full: list[Any] = []
        engine.judge(full.append)
        session.logits(TOKENS)
    for one, other in zip(seen, full, strict=True):
        assert not (one.active & ~one.predicted).any()
        assert np.array_equal(one.active, other.active)


def test_the_pack_is_sound(packs: dict[str, Path]) -> None:
    assert verify(packs["compact"]) == []
    manifest = Manifest.load(packs["compact"])
    assert (manifest.tier, manifest.gate) == ("exact", "compact")
    full, compact = (describe(packs[gate]) for gate in ("full", "compact"))
    assert compact["parameters"] == full["parameters"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_of(tmp_path_factory.mktemp("one") / "source")[0]


def test_resident_bytes(source: Path, tmp_path: Path) -> None:
    """12.25 bits of 16, and three figures a row."""
    sizes = {}
    for gate in ("full", "compact"):
        manifest = Manifest.load(convert(source, tmp_path / gate, gate=gate))
        sizes[gate] = manifest.files["resident.safetensors"].bytes
    neurons, layers, d = 192, SHAPE["layers"], SHAPE["hidden"]
    saved = neurons * layers * (d * (16 - 12.25) / 8 - 12)
    assert abs(sizes["full"] - sizes["compact"] - saved) <= 16384


def test_a_resumed_conversion_recognizes_its_pack(source: Path, tmp_path: Path) -> None:
    pack = convert(source, tmp_path / "pack", gate="compact")
    digest = read_manifest(pack).digest
    assert convert(source, tmp_path / "pack", gate="compact", resume=True) == pack
    with pytest.raises(ConvertError, match="gate: found 'compact', expected 'full'"):
        convert(source, tmp_path / "pack", resume=True)
    assert read_manifest(convert(source, tmp_path / "again", gate="compact")).digest == digest


def test_the_copy_is_of_the_source(source: Path, tmp_path: Path) -> None:
    pack = convert(source, tmp_path / "pack", gate="compact")
    header = read_header(pack / "resident.safetensors", PackError)
    checkpoint = read_header(source / "model.safetensors", PackError)
    rows = read_tensor(checkpoint, "model.layers.1.mlp.gate_proj.weight")
    for name, part in copy_rows(rows, "F16").items():
        assert np.array_equal(read_tensor(header, f"model.layers.1.mlp.gate_proj.{name}"), part)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 4}, "with --bits 4 the gate itself is smaller"),
        ({"bits": 8, "group_size": 32}, "with --bits 8"),
        ({"tier": "dense"}, "tier exact, not of tier dense"),
        ({"tier": "predict"}, "tier exact, not of tier predict"),
    ],
)
def test_refused(source: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        convert(source, tmp_path / "pack", gate="compact", **options)
