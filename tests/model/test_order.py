"""`convert --order`: the same model with its neurons renumbered, everywhere and consistently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import flashsparse
from converter.convert import convert, staging_directory
from flashsparse.cli.info import info
from flashsparse.errors import ConvertError, PackError, UsageError
from flashsparse.pack.inspect import describe
from flashsparse.pack.layout import FileDigest
from flashsparse.pack.manifest import MANIFEST, Manifest, canonical_json
from flashsparse.pack.order import ORDER, OrderSpec, read_orders
from flashsparse.pack.safetensors import read_header, read_tensor
from flashsparse.pack.verify import verify
from tests.checkpoints import write_checkpoint
from tests.model.packs import SHAPE

DEMO = Path(flashsparse.__file__).parent / "demo_model"
TOLERANCE = 1e-4  # another order of adding, seen through a KV cache of 16 bits
NEURONS = 512


def logits(pack: Path, **options: Any) -> np.ndarray:
    with flashsparse.load(pack, max_kv_size=64, **options) as engine, engine.session() as session:
        prompt = session.logits(list(range(3, 30)))
        return np.concatenate([prompt, session.logits([40]), session.logits([50])])


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def both(tmp_path: Path, **options: Any) -> tuple[Manifest, Manifest, np.ndarray]:
    """A random checkpoint's pack in source order and in random order, and that order."""
    made = {key: options.pop(key) for key in list(options) if key in ("family", "bias", "dtype")}
    shape = {key: value for key, value in SHAPE.items() if made.get("family") != "opt" or key != "kv_heads"}
    source = write_checkpoint(tmp_path / "source", **{**shape, "dtype": "F16", **made})
    plain = Manifest.load(convert(source, tmp_path / "plain", **options))
    mixed = Manifest.load(convert(source, tmp_path / "mixed", order="random:3", **options))
    orders = read_orders(mixed)
    assert orders is not None and mixed.order == OrderSpec("random", 3)
    return plain, mixed, orders


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 16, "tier": "exact"},
        {"bits": 4, "tier": "exact"},
        {"bits": 16, "tier": "dense", "dtype": "BF16"},
        {"bits": 8, "tier": "exact", "family": "opt"},
    ],
    ids=str,
)
def test_records_and_gate_rows_are_the_sources_in_another_order(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, mixed, orders = both(tmp_path, **options)
    assert verify(mixed.path) == []
    for layer, order in enumerate(orders):
        expected = read_tensor(plain.flash_header(layer), "records")[order]
        assert np.array_equal(read_tensor(mixed.flash_header(layer), "records"), expected)
    one, two = read_header(plain.resident_path), read_header(mixed.resident_path)
    moved = []
    for name in one.tensors:
        a, b = read_tensor(one, name), read_tensor(two, name)
        if a.tobytes() != b.tobytes():
            moved.append(name)
            assert a[orders[int(name.split(".layers.")[1].split(".")[0])]].tobytes() == b.tobytes()
    assert bool(moved) == (mixed.tier == "exact") and all(".mlp.gate_proj" in n or ".fc1" in n for n in moved)
    assert error(logits(mixed.path), logits(plain.path)) < TOLERANCE


@pytest.mark.parametrize("predictor", ["gate-copy", "gate-up-copy", "svd", "exact-gate"])
def test_predictors_name_the_same_neurons(tmp_path: Path, predictor: str) -> None:
    plain, mixed, orders = both(tmp_path, tier="predict", predictor=predictor)
    sets: dict[str, list[np.ndarray]] = {}
    rows: list[np.ndarray] = []  # of one token: further on a rounding error may tip a score over its threshold
    for name, manifest in (("plain", plain), ("mixed", mixed)):
        found = sets.setdefault(name, [])
        with flashsparse.load(manifest.path, max_kv_size=64) as engine, engine.session() as session:
            engine.observe(lambda layer, ids, found=found: found.append(ids.copy()))
            rows.append(session.logits([7]))
    for layer, order in enumerate(orders):
        assert np.sort(order[sets["mixed"][layer]]).tolist() == sets["plain"][layer].tolist()
        assert 0 < len(sets["plain"][layer]) < NEURONS
    assert error(rows[1], rows[0]) < TOLERANCE


def test_results_do_not_depend_on_the_slots(tmp_path: Path) -> None:
    _, mixed, _ = both(tmp_path)
    expected = logits(mixed.path)
    assert all(np.array_equal(logits(mixed.path, slots=slots), expected) for slots in (64, 200))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Once upon a time there was a little girl who lived by the sea and had a small red boat. " * 40)
    return path


class Stop(Exception):
    """Stops a conversion."""


@pytest.mark.parametrize("tier", ["exact", "predict"])
def test_a_measured_order_resumes_and_is_the_same_every_time(tmp_path: Path, text: Path, tier: str) -> None:
    options: dict[str, Any] = {
        "tier": tier, "bits": 4, "order": "coactivation", "calibrate": text, "calibrate_tokens": 256,
        "calibrate_window": 128,
    }  # fmt: skip

    def stop(name: str, done: int, total: int) -> None:
        if name == "flash-002.safetensors":
            raise Stop

    whole = Manifest.load(convert(DEMO, tmp_path / "whole", **options))
    with pytest.raises(Stop):
        convert(DEMO, tmp_path / "pack", progress=stop, **options)
    with pytest.raises(ConvertError, match="order"):
        convert(DEMO, tmp_path / "pack", resume=True, **{**options, "order": "frequency"})
    pack = Manifest.load(convert(DEMO, tmp_path / "pack", resume=True, **options))
    assert pack.digest == whole.digest and not staging_directory(pack.path).exists()
    assert pack.order is not None and (pack.order.kind, pack.order.tokens) == ("coactivation", 256)
    assert len(pack.order.texts) == 1
    orders = read_orders(pack)
    assert orders is not None and len({order.tobytes() for order in orders}) == pack.layers
    convert(DEMO, tmp_path / "pack", resume=True, **options)  # complete: recognized
    with pytest.raises(ConvertError, match="order: found"):
        convert(DEMO, tmp_path / "pack", resume=True, **{**options, "order": "frequency"})


def test_frequency_order_is_of_the_frequency_that_calibration_finds(tmp_path: Path, text: Path) -> None:
    options: dict[str, Any] = {"calibrate": text, "calibrate_tokens": 256, "calibrate_window": 128}
    pack = Manifest.load(convert(DEMO, tmp_path / "pack", order="frequency", **options))
    from converter.calibrate import calibrate
    from flashsparse.sparsity.calibration import open_calibration

    orders = read_orders(pack)
    assert orders is not None
    found = open_calibration(calibrate(DEMO, [text], out=tmp_path / "calibration", tokens=256, window=128))
    for layer, order in enumerate(orders):
        frequency = found.tensor(layer, "frequency")
        assert frequency is not None and np.array_equal(order, np.argsort(-frequency, kind="stable"))


def test_an_order_that_is_none_is_refused(tmp_path: Path) -> None:
    _, mixed, orders = both(tmp_path)
    path = mixed.path / ORDER
    data = bytearray(path.read_bytes())
    data[-4 * NEURONS :] = np.zeros(NEURONS, "<i4").tobytes()
    path.write_bytes(data)
    assert [damage.file for damage in verify(mixed.path)] == [ORDER]
    digest = FileDigest()
    digest.update(bytes(data))
    mixed.files[ORDER] = digest.entry()
    mixed.__dict__.pop("digest", None)
    mixed.write()
    assert [(damage.file, damage.kind) for damage in verify(mixed.path)] == [(ORDER, "contents")]
    with pytest.raises(PackError, match=f"layer {len(orders) - 1}.*each of {NEURONS} neurons once"):
        describe(mixed.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["files"].pop(ORDER),
        lambda body: body.pop("order"),
        lambda body: body["order"].update(kind="best"),
        lambda body: body["order"].update(seed=None),
        lambda body: body["order"].update(tokens=5),
        lambda body: body["order"].update(texts=["0" * 64]),
        lambda body: body["order"].update(kind="frequency"),
        lambda body: body["order"].update(more=1),
    ],
)
def test_a_manifest_whose_order_is_wrong_is_refused(tmp_path: Path, change: Any) -> None:
    _, mixed, _ = both(tmp_path)
    body = json.loads((mixed.path / MANIFEST).read_text())
    change(body)
    (mixed.path / MANIFEST).write_text(canonical_json(body))
    with pytest.raises(PackError, match="order"):
        Manifest.load(mixed.path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": "best"}, "expected source, frequency, coactivation or random"),
        ({"order": "frequency:2"}, "expected source"),
        ({"order": "random:x"}, "seed"),
        ({"order": "coactivation"}, "--calibrate"),
        ({"order": "random", "calibrate": "text"}, "is for tier predict"),
    ],
)
def test_orders_that_make_no_sense_are_usage_errors(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    source = write_checkpoint(tmp_path / "source", dtype="F16")
    with pytest.raises(UsageError, match=said):
        convert(source, tmp_path / "pack", **options)


def test_without_zeros_nothing_is_measured(tmp_path: Path, text: Path) -> None:
    source = write_checkpoint(tmp_path / "source", dtype="F16", activation="silu")
    with pytest.raises(UsageError, match="silu has no zeros"):
        convert(source, tmp_path / "pack", order="frequency", calibrate=text)


def test_info_says_the_order(tmp_path: Path) -> None:
    _, mixed, _ = both(tmp_path)
    said = CliRunner().invoke(info, [str(mixed.path)])
    assert "order         random, seed 3" in said.output
    assert describe(mixed.path)["order"] == {"kind": "random", "seed": 3, "texts": [], "tokens": 0}
