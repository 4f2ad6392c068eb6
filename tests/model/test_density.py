"""`convert --tier exact --calibrate`: what a token needs of each layer is in the pack, and slots are divided by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import flashsparse
from converter.convert import convert
from flashsparse.cli.info import info
from flashsparse.errors import ConvertError
from flashsparse.memory import MemoryPlan
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.verify import verify

DEMO = Path(flashsparse.__file__).parent / "demo_model"
OPTIONS: dict[str, Any] = {"tier": "exact", "calibrate_tokens": 128, "calibrate_window": 128}
TEXT = "The river ran past the old mill, and nobody had opened its door for thirty years. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Manifest:
    return Manifest.load(convert(DEMO, tmp_path_factory.mktemp("pack") / "pack", calibrate=text, **OPTIONS))


def run(path: Path, dram: int | None = None, **options: Any) -> tuple[np.ndarray, MemoryPlan, list[float]]:
    """Logits of 128 tokens one by one, the memory plan, and the share of each layer's neurons that one needs."""
    needed: dict[int, list[int]] = {}
    with flashsparse.load(path, dram=dram, max_kv_size=256, **options) as engine, engine.session() as session:
        engine.observe(lambda layer, ids: needed.setdefault(layer, []).append(len(ids)))
        rows = [session.logits([token]) for token in engine.tokenizer.encode(TEXT * 40)[:128]]
        neurons = engine.manifest.intermediate_size
        return np.concatenate(rows), engine.plan, [float(np.mean(needed[layer])) / neurons for layer in sorted(needed)]


def test_densities_are_what_a_run_needs(pack: Manifest) -> None:
    assert pack.activity is not None and pack.activity.tokens == 128
    _, _, shares = run(pack.path, slots=64)
    assert pack.activity.densities == pytest.approx(shares, abs=0.01)
    assert verify(pack.path) == []
    shown = CliRunner().invoke(info, [str(pack.path)], catch_exceptions=False).output
    assert "measured on 128 tokens" in shown


def test_slots_follow_the_densities_and_results_do_not(pack: Manifest, tmp_path: Path) -> None:
    assert pack.activity is not None
    plain = Manifest.load(convert(DEMO, tmp_path / "plain", tier="exact"))
    expected, equal, _ = run(plain.path)
    budget = equal.floor + (equal.needs_all - equal.floor) // 4
    divided, plan, _ = run(pack.path, budget)
    assert np.array_equal(divided, expected)
    _, equal, _ = run(plain.path, budget)
    assert len(set(equal.slots)) == 1 and len(set(plan.slots)) > 1
    assert abs(sum(plan.slots) - sum(equal.slots)) <= pack.layers
    assert np.array_equal(np.argsort(plan.slots, kind="stable")[-1:], np.argsort(pack.activity.densities)[-1:])


def test_it_resumes_and_is_recognized(pack: Manifest, text: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        """Stops a conversion."""

    def stop(name: str, done: int, total: int) -> None:
        if name == "flash-002.safetensors":
            raise Stop

    path = tmp_path / "pack"
    with pytest.raises(Stop):
        convert(DEMO, path, calibrate=text, progress=stop, **OPTIONS)
    with pytest.raises(ConvertError, match="option calibrate"):
        convert(DEMO, path, tier="exact", resume=True)
    assert Manifest.load(convert(DEMO, path, calibrate=text, resume=True, **OPTIONS)).digest == pack.digest
    convert(DEMO, path, calibrate=text, resume=True, **OPTIONS)  # complete: recognized
    with pytest.raises(ConvertError, match="activity: found"):
        convert(DEMO, path, tier="exact", resume=True)


def test_one_walk_measures_an_order_too(pack: Manifest, text: Path, tmp_path: Path) -> None:
    found = Manifest.load(convert(DEMO, tmp_path / "pack", calibrate=text, order="frequency", **OPTIONS))
    assert found.activity == pack.activity and found.order is not None
