"""Conversion to tier predict: every kind of predictor and model, targets, thresholds, and refusals.

How it goes on after failures is in test_convert_predict_resume.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from converter.convert import convert
from converter.model import open_model
from converter.predict_fit import GRID, SMALLEST, LayerResult
from converter.predict_target import at_recall, meet_density_ratio
from converter.predictors.powerinfer import KIND
from converter.predictors.thresholds import Calibrated
from converter.walk import Block, walk, windows_of
from flashsparse.cli.convert import convert as command
from flashsparse.engine import load
from flashsparse.errors import ConvertError, FlashSparseError, UnsupportedModelError, UsageError
from flashsparse.pack.inspect import describe
from flashsparse.pack.manifest import PREDICTOR, Manifest
from flashsparse.pack.safetensors import header_bytes, read_header, read_tensor
from flashsparse.pack.verify import verify
from flashsparse.sparsity.judgement import LayerJudgement
from flashsparse.sparsity.low_bit import LowBit
from flashsparse.sparsity.selection import needed
from flashsparse.sparsity.spec import LayerSpec
from flashsparse.sparsity.texts import file_sha256, refuse_same_text
from flashsparse.sparsity.thresholds_file import ModelShape, Thresholds, write_thresholds
from tests.model.test_calibrate import WORDS, tiny, words

WINDOW = 64
TOKENS = 800


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words(tmp_path_factory.mktemp("text") / "text.txt", TOKENS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("source") / "source")


def predict(source: Path, dst: Path, text: Path | None = None, **options: Any) -> Manifest:
    """A pack of tier predict that passes `verify` and generates."""
    chosen = {"calibrate": text, "calibrate_window": WINDOW} if text is not None else {}
    path = convert(source, dst, tier="predict", **chosen, **options)
    assert verify(path) == [] and describe(path)["predictor"] is not None
    with load(path, dram="1GB") as engine, engine.session() as session:
        assert len(list(session.generate([1, 2, 3], max_tokens=4))) >= 1
        assert engine.tier == "predict"
    return Manifest.load(path)


def layers(manifest: Manifest) -> tuple[LayerSpec, ...]:
    assert manifest.predictor is not None
    return manifest.predictor.layers


MODELS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gqa bias": {"mlp_bias": True, "attention_bias": True},
    "qwen2": {"family": "qwen2"},
    "bf16 tied": {"dtype": "BF16", "tie": True},
    "fatrelu": {"family": "sparsellama", "activation": "fatrelu", "hidden_act_param": 0.05},
    "drelu": {"family": "bamboo", "activation": "drelu"},
    "relu2": {"activation": "relu2"},
    "silu": {"activation": "silu"},
    "minicpm": {"family": "minicpm", "activation": "relu"},
    "opt": {"family": "opt"},
    "opt norm after": {"family": "opt", "do_layer_norm_before": False},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["gate-copy", "gate-up-copy", "exact-gate"])
def test_models(tmp_path: Path, text: Path, model: str, kind: str) -> None:
    found = predict(tiny(tmp_path / "source", **MODELS[model]), tmp_path / "pack", text, predictor=kind)
    spec = found.predictor
    assert spec is not None
    assert (spec.score, spec.target, spec.target_value) == (
        {"exact-gate": "gate"}.get(kind, kind.replace("-", "_")), "value_recall", 0.98
    )  # fmt: skip
    assert (spec.texts, spec.tokens) == ((file_sha256(text),), TOKENS)
    assert found.gate == ("full" if kind == "exact-gate" else "none")
    assert (PREDICTOR in found.files) == spec.has_tensors
    for layer in spec.layers:
        assert layer.density is not None and layer.value_recall is not None
        assert layer.every or (0 < layer.density < 1 and 0.98 <= layer.value_recall < 0.985)
        # Scores of 0, where copies of a random layer say that the gate is shut, cannot be told apart.
        assert not layer.every or (kind == "gate-up-copy" and layer.density == 1)
    assert spec.calibrated_density is not None


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["svd", "wsvd", "trained"])
@pytest.mark.parametrize("rank", [None, 8])
def test_low_rank(tmp_path: Path, text: Path, family: str, kind: str, rank: int | None) -> None:
    found = predict(tiny(tmp_path / "s", family=family), tmp_path / "p", text, predictor=kind, predictor_rank=rank)
    assert {layer.rank for layer in layers(found)} == {rank or 48 * 64 * 5 // 16 // (2 * (48 + 64))}


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_bits_of_copies(source: Path, tmp_path: Path, text: Path, bits: int) -> None:
    found = predict(source, tmp_path / "pack", text, predictor_bits=bits, bits=8 if bits == 3 else 4)
    assert {(layer.bits, layer.group_size) for layer in layers(found)} == {(bits, 64)}
    assert found.quant is not None and found.quant.bits == (8 if bits == 3 else 4)


@pytest.mark.parametrize("rule", ["topk", "topk-and-threshold"])
@pytest.mark.parametrize("target", ["recall:0.9", "density:0.25", "density-ratio:0.7"])
def test_selections(source: Path, tmp_path: Path, text: Path, rule: str, target: str) -> None:
    found = predict(source, tmp_path / "pack", text, select=rule, target=target)
    assert found.predictor is not None and found.predictor.selection == rule.replace("-", "_")
    for layer in layers(found):
        assert layer.k is not None and (layer.threshold is None) == (rule == "topk")


def test_the_same_bytes_twice(source: Path, tmp_path: Path, text: Path) -> None:
    for kind in ("gate-copy", "trained"):
        packs = [predict(source, tmp_path / f"{kind}-{n}", text, predictor=kind) for n in range(2)]
        assert packs[0].digest == packs[1].digest
    moved = words(tmp_path / "elsewhere.txt", TOKENS)
    assert predict(source, tmp_path / "moved", moved).digest == Manifest.load(tmp_path / "gate-copy-0").digest


def test_masks_at_run_time_are_those_calibrated(source: Path, tmp_path: Path, text: Path) -> None:
    """The first layer sees the same inputs dense and masked, so the engine must select what was calibrated."""
    found = predict(source, tmp_path / "pack", text, target="recall:0.9")
    seen: dict[str, np.ndarray] = {}

    def keep(judgement: LayerJudgement) -> None:
        if judgement.layer == 0:
            seen["predicted"], seen["values"] = judgement.predicted, judgement.values

    ids = list(np.random.default_rng(3).integers(0, WORDS, 48))
    with load(found.path, dram="1GB") as engine, engine.session() as session:
        engine.judge(keep)
        list(session.generate([int(n) for n in ids], max_tokens=1))
    header, layer = read_header(found.predictor_path), layers(found)[0]
    parts = [read_tensor(header, f"layers.0.gate.{part}") for part in ("weight", "scales", "biases")]
    copy = LowBit(*parts, bits=2, group=64)
    blocks: list[Block] = []
    with open_model(source) as model:
        walk(model, windows_of(ids, len(ids)), lambda block: blocks.append(block)).close()
    assert layer.threshold is not None
    expected = copy.product(blocks[0].x) >= layer.threshold
    assert np.mean(seen["predicted"] != expected) < 0.002  # float16 norms and sums in another order
    assert 0.8 < np.mean(expected[needed(blocks[0].hidden, np.ones(48, np.float32))]) < 0.97


@pytest.mark.parametrize(
    ("model", "kind", "boundary"),
    [
        ("relu", "gate-copy", SMALLEST),
        ("relu", "gate-up-copy", SMALLEST),
        ("relu2", "exact-gate", SMALLEST),
        ("fatrelu", "gate-copy", float(np.float32(0.05))),
        ("fatrelu", "exact-gate", float(np.float32(0.05))),
        ("opt", "svd", SMALLEST),
    ],
)
def test_without_text(tmp_path: Path, model: str, kind: str, boundary: float) -> None:
    found = predict(tiny(tmp_path / "source", **MODELS[model]), tmp_path / "pack", predictor=kind)
    spec = found.predictor
    assert spec is not None
    assert (spec.target, spec.target_value, spec.texts, spec.tokens) == ("none", None, (), 0)
    assert {layer.threshold for layer in spec.layers} == {boundary}
    assert {layer.density for layer in spec.layers} == {None}


def test_exact_gate_at_the_boundary_is_the_exact_tier(source: Path, tmp_path: Path) -> None:
    packs = [convert(source, tmp_path / "exact"), predict(source, tmp_path / "pack", predictor="exact-gate").path]
    said = []
    for path in packs:
        with load(path, dram="1GB") as engine, engine.session() as session:
            said.append([piece.token for piece in session.generate([5, 6, 7], max_tokens=20)])
    assert said[0] == said[1]


# Targets over all layers


def test_density_ratio(source: Path, tmp_path: Path, text: Path) -> None:
    full = predict(source, tmp_path / "full", text, predictor="exact-gate", target="recall:1")
    assert full.predictor is not None and full.predictor.calibrated_density is not None
    for ratio in (0.5, 1.0):
        found = predict(source, tmp_path / f"{ratio}", text, target=f"density-ratio:{ratio}")
        assert found.predictor is not None
        assert found.predictor.calibrated_density == pytest.approx(ratio * full.predictor.calibrated_density, rel=1e-6)
        recalls = [layer.value_recall for layer in layers(found)]
        assert np.ptp(np.array(recalls, float)) < 0.01


def test_curves_are_met_between_their_points() -> None:
    curve = tuple(Calibrated(1 - recall, None, recall**2, recall, recall, 1.0) for recall in GRID)
    results = [LayerResult(LayerSpec(), 0.4, curve), LayerResult(LayerSpec(every=True), 0.8)]
    found = at_recall(results[0], 0.77)
    assert found.value_recall == pytest.approx(0.77) and found.density == pytest.approx(0.77**2, abs=1e-3)
    assert found.threshold == pytest.approx(0.23)
    low, whole = meet_density_ratio(results, 1.0)  # (0.2 + 1) / 2 = 0.6
    assert whole.every and low.density == pytest.approx(0.2, abs=1e-3)
    assert meet_density_ratio(results, 9.0)[0].density == pytest.approx(1.0)
    tied = tuple(replace(point, density=1.0 if point.value_recall > 0.7 else 0.2) for point in curve)
    assert at_recall(LayerResult(LayerSpec(), 0.4, tied), 0.72).density == 0.2
    assert meet_density_ratio([LayerResult(LayerSpec(), 0.4, tied)], 1.0)[0].density == 0.2
    assert LayerResult.from_tensor(results[0].to_tensor()) == results[0]


def test_ppl_ratio(source: Path, tmp_path: Path, text: Path) -> None:
    loose = predict(source, tmp_path / "loose", text, target="ppl-ratio:1.2")
    tight = predict(source, tmp_path / "tight", text, target="ppl-ratio:1.01")
    assert loose.predictor is not None and tight.predictor is not None
    assert (tight.predictor.target, tight.predictor.target_value) == ("ppl_ratio", 1.01)
    assert loose.predictor.calibrated_density is not None and tight.predictor.calibrated_density is not None
    assert loose.predictor.calibrated_density < tight.predictor.calibrated_density
    assert tight.predictor.tokens == TOKENS
    with pytest.raises(UsageError, match="--target ppl-ratio: the texts hold 70 tokens, expected at least 128"):
        predict(source, tmp_path / "short", words(tmp_path / "short.txt", 70), target="ppl-ratio:1.1")
    with pytest.raises(UsageError, match="the texts hold 20 tokens, expected at least one window of 64"):
        predict(source, tmp_path / "short", words(tmp_path / "short.txt", 20))
    with pytest.raises(UsageError, match="--calibrate-tokens: found 2 for 2 texts"):
        other = words(tmp_path / "other.txt", 70)
        convert(source, tmp_path / "short", tier="predict", calibrate=[text, other], calibrate_tokens=2)


def test_several_texts(source: Path, tmp_path: Path, text: Path) -> None:
    other, again = words(tmp_path / "other.txt", 70), tmp_path / "again.txt"
    options: dict[str, Any] = {"tier": "predict", "calibrate_window": WINDOW, "predictor": "exact-gate"}
    for order in ([text, other], [other, text]):
        found = Manifest.load(convert(source, tmp_path / "pack", calibrate=order, force=True, **options))
        assert found.predictor is not None
        assert found.predictor.texts == tuple(sorted([file_sha256(text), file_sha256(other)]))
        for judged in order:
            with pytest.raises(UsageError, match="the pack was calibrated on this text"):
                refuse_same_text([judged], found.predictor.texts)
    assert convert(source, tmp_path / "pack", calibrate=[other, text], resume=True, **options) == tmp_path / "pack"
    again.write_bytes(text.read_bytes())
    with pytest.raises(UsageError, match=r"again\.txt: the same text as .*text\.txt"):
        convert(source, tmp_path / "twice", calibrate=[text, again], **options)
    assert not (tmp_path / "twice").exists()


def test_a_hidden_size_that_no_group_divides(tmp_path: Path) -> None:
    odd = tiny(tmp_path / "odd", hidden=40)
    with pytest.raises(UsageError, match=r"gate-copy: rows of 40 weights.*; use --predictor svd or exact-gate"):
        convert(odd, tmp_path / "copy", tier="predict")
    ranked = predict(odd, tmp_path / "rank", predictor="svd")
    assert [layer.rank for layer in layers(ranked)] == [3] * ranked.layers  # 48 rows of 14 bytes by 2 (48 + 40) a rank


def test_auto_sizes(source: Path, tmp_path: Path, text: Path) -> None:
    """A tiny model's layers are dense: with a strict target each is cheapest computed whole."""
    loose = predict(source, tmp_path / "loose", text, target="value-recall:0.3", predictor_bits="auto")
    assert not any(layer.every for layer in layers(loose)) and all(layer.bits for layer in layers(loose))
    whole = predict(source, tmp_path / "whole", text, target="value-recall:1", predictor_bits="auto")
    assert whole.predictor is not None and all(layer.every for layer in layers(whole))
    assert whole.predictor.calibrated_density == 1 and PREDICTOR not in whole.files
    ranked = predict(
        source, tmp_path / "rank", text, target="value-recall:0.3", predictor="wsvd", predictor_rank="auto"
    )
    assert all(layer.every or layer.rank in (3, 6, 12, 24) for layer in layers(ranked))


# Thresholds and predictors from files


def thresholds(path: Path, quantity: str = "gate", activation: str = "relu", **model: Any) -> Path:
    metric = {"gate": "fat", "value": "pplp", "hidden": "teal"}[quantity]
    shape = ModelShape("llama", 64, 48, 2, activation)
    found = Thresholds(quantity, metric, 0.1, replace(shape, **model), (0.25, 0.0), (0.3, 0.4), 1.01, ("0" * 64,), 100)
    write_thresholds(path, found)
    return path


@pytest.mark.parametrize(
    ("activation", "kind", "expected"),
    [
        ("relu", None, (0.25, SMALLEST)),
        ("relu2", None, (0.5, SMALLEST)),
        ("silu", None, (0.25, 0.0)),
        ("silu", "gate-copy", (0.25, 0.0)),
    ],
)
def test_thresholds_on_the_gate(
    tmp_path: Path, text: Path, activation: str, kind: str | None, expected: tuple[float, float]
) -> None:
    file = thresholds(tmp_path / "thresholds.json", activation=activation)
    model = tiny(tmp_path / "source", activation=activation)
    found = predict(model, tmp_path / "pack", thresholds=file, predictor=kind)
    assert found.predictor is not None and found.predictor.target == "thresholds"
    assert found.predictor.score == ("gate_copy" if kind else "gate")
    assert tuple(layer.threshold for layer in layers(found)) == expected
    measured = predict(model, tmp_path / "measured", text, thresholds=file, predictor=kind)
    for layer, threshold in zip(layers(measured), expected, strict=True):
        assert layer.threshold == threshold or (layer.every and threshold == 0)
    assert measured.predictor is not None and measured.predictor.tokens == TOKENS
    assert measured.predictor.texts == ("0" * 64, file_sha256(text))  # neither may judge it
    assert all(layer.density is not None for layer in layers(measured))


@pytest.mark.parametrize("quantity", ["value", "hidden"])
@pytest.mark.parametrize("activation", ["relu", "relu2", "silu"])
def test_thresholds_on_values(tmp_path: Path, activation: str, quantity: str) -> None:
    source = tiny(tmp_path / "source", activation=activation)
    found = predict(source, tmp_path / "pack", thresholds=thresholds(tmp_path / "t.json", quantity, activation))
    assert found.predictor is not None and found.predictor.score == "gate_up_copy"
    assert [layer.threshold for layer in layers(found)] == [0.25, 0.0 if activation == "silu" else SMALLEST]
    assert {layer.bits for layer in layers(found)} == {4}
    assert (found.predictor.texts, found.predictor.tokens) == (("0" * 64,), 100)  # not to be judged on that text
    assert convert(source, tmp_path / "pack", tier="predict", thresholds=tmp_path / "t.json", resume=True) == found.path
    norms = read_tensor(read_header(found.predictor_path), "layers.0.down_norm")
    assert (norms == 1).all() == (quantity == "hidden")


def test_a_threshold_of_zero_skips_exact_zeros(source: Path, tmp_path: Path, text: Path) -> None:
    """As `sparsity` counts: a layer whose value threshold is 0 is not computed whole."""
    file = thresholds(tmp_path / "t.json", "value")
    found = predict(source, tmp_path / "pack", text, thresholds=file)
    density = layers(found)[1].density
    assert not layers(found)[1].every and density is not None and 0 < density < 0.9


def test_thresholds_of_another_model(source: Path, tmp_path: Path) -> None:
    for name, value in (("intermediate_size", 50), ("activation", "silu"), ("model_type", "mistral")):
        file = thresholds(tmp_path / "t.json", **{name: value})
        with pytest.raises(UsageError, match=rf"t.json: {name}: found {value!r}, expected"):
            convert(source, tmp_path / "pack", tier="predict", thresholds=file)
    with pytest.raises(UsageError, match=r"--predictor gate-copy and --thresholds .*on 'value', expected gate-up-copy"):
        file = thresholds(tmp_path / "t.json", "value")
        convert(source, tmp_path / "pack", tier="predict", thresholds=file, predictor="gate-copy")
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def imported(path: Path, rank: int = 8, width: int = 48) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"fc1.weight": (rank, 64), "fc2.weight": (width, rank)}
    stored = {f"layers.{n}.{name}": ("F16", shape) for n in range(2) for name, shape in shapes.items()}
    data = b"".join(rng.standard_normal(shape).astype("<f2").tobytes() for _, shape in stored.values())
    path.write_bytes(header_bytes(stored, metadata={"kind": KIND, "threshold": "0.5"}) + data)
    return path


def test_imported_predictors(source: Path, tmp_path: Path, text: Path) -> None:
    file = imported(tmp_path / "predictors.safetensors")
    plain = predict(source, tmp_path / "plain", predictor_from=file)
    assert {(layer.rank, layer.relu, layer.threshold) for layer in layers(plain)} == {(8, True, 0.5)}
    found = predict(source, tmp_path / "pack", text, predictor_from=file, target="density:0.5")
    assert all(layer.density == pytest.approx(0.5, abs=0.01) for layer in layers(found))
    with pytest.raises(FlashSparseError, match=r"found .*47"):
        convert(source, tmp_path / "p", tier="predict", predictor_from=imported(tmp_path / "other", width=47))
    with pytest.raises(UnsupportedModelError, match=r"--predictor-from .*LayerNorm"):
        convert(tiny(tmp_path / "opt", family="opt"), tmp_path / "p", tier="predict", predictor_from=file)


# Refusals

T = {"calibrate": ["text"]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tier": "auto", **T}, "--calibrate is for tier predict, but found --tier auto"),
    ({"tier": "exact", "predictor": "svd"}, "--predictor is for tier predict, but found --tier exact"),
    ({"predictor": "gates", **T}, "--predictor: found 'gates', expected one of gate-copy, "),
    ({"select": "all", **T}, "--select: found 'all', expected one of threshold, "),
    ({"calibrate_tokens": 1, **T}, "--calibrate-tokens: found 1, expected at least 2"),
    ({"predictor_bits": 5, **T}, "--predictor-bits: found 5, expected one of 1, 2, 3, 4, or auto"),
    ({"predictor_bits": "many", **T}, "--predictor-bits: found 'many'"),
    ({"predictor": "svd", "predictor_rank": 0}, "--predictor-rank: found 0, expected a whole number"),
    ({"predictor_rank": 8}, "--predictor-rank and --predictor gate-copy: --predictor-rank is for svd"),
    ({"predictor": "svd", "predictor_bits": 2}, "--predictor-bits and --predictor svd: --predictor-bits is for gate"),
    ({"predictor": "exact-gate", "predictor_bits": 2}, "--predictor-bits and --predictor exact-gate"),
    ({"predictor_bits": "auto"}, "--predictor-bits auto needs --calibrate FILE"),
    ({"target": "density:0.1"}, "--target density:0.1 needs a text to calibrate on: add --calibrate FILE"),
    ({"select": "topk"}, "--select topk needs a text"),
    ({"calibrate_tokens": 100}, "--calibrate-tokens 100 needs a text"),
    ({"predictor": "trained"}, "--predictor trained needs a text"),
    ({"target": "speed:3", **T}, "--target 'speed:3': expected KIND:VALUE, KIND one of value-recall, "),
    ({"target": "value-recall:1.5", **T}, "found '1.5', expected a number above 0, at most 1"),
    ({"target": "ppl-ratio:1", **T}, "found '1', expected a number above 1"),
    ({"target": "density:nan", **T}, "found 'nan'"),
    ({"target": "density", **T}, "found ''"),
    ({"thresholds": "f", "target": "density:0.1", **T}, "--thresholds and --target density:0.1"),
    ({"thresholds": "f", "select": "topk", **T}, "--thresholds and --select topk"),
    ({"thresholds": "f", "predictor_bits": "auto", **T}, "--predictor-bits auto and --thresholds"),
    ({"thresholds": "f", "predictor_rank": 4}, "--predictor-rank and --thresholds"),
    ({"predictor_from": "f", "predictor": "svd"}, "--predictor-from and --predictor svd"),
    ({"predictor_from": "f", "thresholds": "g"}, "--predictor-from and --thresholds g"),
    ({"predictor_from": "f", "predictor_bits": 2}, "--predictor-bits and --predictor-from"),
    ({"thresholds": "missing"}, "missing: no such file"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_do_not_agree(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as problem:
        convert(source, tmp_path / "pack", **{"tier": "predict", **options})
    assert message in str(problem.value)
    assert list(tmp_path.iterdir()) == []


def test_models_that_need_more(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UsageError, match=r"silu has no zeros .* --calibrate FILE, or thresholds with --thresholds"):
        convert(tiny(tmp_path / "silu", activation="silu"), tmp_path / "p", tier="predict")
    odd = tiny(tmp_path / "odd", hidden=48, heads=2, kv_heads=1)
    with pytest.raises(UsageError, match="rows of 48 weights: no group size fits"):
        convert(odd, tmp_path / "p", tier="predict", calibrate=text, calibrate_window=WINDOW)
    with pytest.raises(UsageError, match="rank 60: expected 1 to 48"):
        model = tiny(tmp_path / "s")
        convert(model, tmp_path / "p", tier="predict", calibrate=text, predictor="wsvd", predictor_rank=60)
    with pytest.raises(UsageError, match=r"no.txt: cannot be read"):
        convert(model, tmp_path / "p3", tier="predict", calibrate=tmp_path / "no.txt")


# The command


def test_command(source: Path, tmp_path: Path, text: Path) -> None:
    run = CliRunner().invoke
    arguments = [str(source), str(tmp_path / "pack"), "--tier", "predict", "--calibrate", str(text)]
    other = str(words(tmp_path / "other.txt", TOKENS, seed=1))
    done = run(command, [*arguments, "--calibrate-window", "64", "--calibrate", other, "--predictor-bits", "3"])
    assert done.exit_code == 0, done.output
    for part in (
        "tier        predict",
        "predictor   gate-copy bits 3, ",
        "% of the FFN in 16 bits",
        "selection   threshold for value recall 0.98: ",
        "quality     not measured: run `flashsparse eval PACK --text FILE` with another text",
        "note: 1600 tokens, as the texts hold no more of the 10000 asked",
    ):
        assert part in done.output
    assert "layer 2 of 2" in done.stderr and "predictor.safetensors" in done.stderr
    plain = run(command, [str(source), str(tmp_path / "plain"), "--tier", "predict", "--predictor", "exact-gate"])
    assert "gate, resident with the model" in plain.output and "not calibrated" in plain.output


def test_resume_of_a_finished_pack(source: Path, tmp_path: Path, text: Path) -> None:
    options = {"tier": "predict", "calibrate": text, "calibrate_window": WINDOW}
    first = json.loads((convert(source, tmp_path / "pack", **options) / "pack.json").read_text())
    assert convert(source, tmp_path / "pack", resume=True, **options) == tmp_path / "pack"
    assert json.loads((tmp_path / "pack" / "pack.json").read_text()) == first
    other = words(tmp_path / "other.txt", TOKENS, seed=5)
    for change in (
        {"target": "density:0.2"},
        {"predictor_bits": 3},
        {"predictor": "exact-gate"},
        {"calibrate": other},
        {"calibrate_tokens": 700},
        {"select": "topk"},
        {"tier": "auto", "calibrate": (), "calibrate_window": None},
    ):
        with pytest.raises(ConvertError, match="not what would be converted"):
            convert(source, tmp_path / "pack", resume=True, **{**options, **change})
