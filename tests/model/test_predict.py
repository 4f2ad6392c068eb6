"""Tier predict in the engine: the same bits however it runs, exact where everything is selected, honest judgements."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse.cache import SLOT_BYTES
from flashsparse.engine import Engine
from flashsparse.pack.manifest import PREDICTOR, Manifest
from flashsparse.pack.safetensors import read_header, read_tensor
from flashsparse.sparsity import selection
from flashsparse.sparsity.judgement import LayerJudgement
from flashsparse.sparsity.low_bit import LowBit
from flashsparse.sparsity.spec import LayerSpec
from tests.model.packs import make_pack
from tests.model.predict_packs import (
    LOWEST,
    Tensors,
    default_layer,
    ffn,
    make_predict_pack,
    source_weights,
    write_tensors,
)

PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 160, 70)]
STEPS = [int(t) for t in np.random.default_rng(8).integers(3, 160, 6)]
EVERYTHING = LayerSpec(bits=2, group_size=64, threshold=LOWEST)
NOTHING = replace(EVERYTHING, threshold=1e30)
COPY = default_layer("gate_copy")
MODELS: dict[str, dict[str, Any]] = {
    "gate_copy": {},
    "gate_copy, 4-bit records": {"bits": 4},
    "gate_copy, 1 bit, OPT": {"family": "opt", "layer": replace(COPY, bits=1)},
    "gate_copy, silu": {"activation": "silu"},
    "gate_copy, top-k": {"selection": "topk", "layer": replace(COPY, threshold=None, k=60)},
    "gate_copy, both": {"selection": "topk_and_threshold", "layer": replace(COPY, k=60), "mlp_bias": True},
    "gate_up_copy": {"score": "gate_up_copy", "layer": replace(COPY, bits=3)},
    "gate_up_copy, drelu": {"score": "gate_up_copy", "family": "bamboo", "bits": 8},
    "gate_up_copy, OPT": {"score": "gate_up_copy", "family": "opt"},
    "low_rank": {"score": "low_rank"},
    "gate": {"score": "gate"},
    "gate, silu": {"score": "gate", "activation": "silu"},
    "mixed": {"layers": {1: LayerSpec(every=True)}},
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_predict_pack(tmp_path_factory.mktemp("predict"))


def feed(engine: Engine) -> np.ndarray:
    """Logits of a prefill and of some decode steps, in a session of its own."""
    with engine.session() as session:
        return np.concatenate([session.logits(PROMPT), *(session.logits([t]) for t in STEPS)])


def run(path: Path, **options: Any) -> np.ndarray:
    with flashsparse.load(path, **options) as engine:
        return feed(engine)


@pytest.mark.parametrize("model", list(MODELS))
def test_output_is_the_same_bits_however_it_is_computed(tmp_path: Path, model: str) -> None:
    path = make_predict_pack(tmp_path, **MODELS[model])
    expected = run(path, slots=512, threads=1, io_threads=1, read_mode="buffered")
    assert np.isfinite(expected).all()
    for slots, threads, mode in ((40, 3, "direct"), (300, 1, "buffered")):
        assert np.array_equal(expected, run(path, slots=slots, threads=threads, io_threads=4, read_mode=mode)), slots
    with flashsparse.load(path, slots=200) as engine:
        with engine.session() as session:
            singly = np.concatenate([session.logits([t]) for t in PROMPT[:12]])
        assert np.array_equal(expected[:12], singly)
        assert 0 < engine.counters.predicted < engine.counters.scored
        seen: list[LayerJudgement] = []
        engine.judge(seen.append)
        assert np.array_equal(expected, feed(engine))
        engine.judge(None)
        assert np.array_equal(expected, feed(engine))
    assert len(seen) == 3 * (2 + len(STEPS))


@pytest.mark.parametrize("checkpoint", [{}, {"family": "opt"}, {"activation": "silu", "bits": 4}], ids=str)
def test_with_everything_selected_the_result_is_the_dense_tiers(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    path = make_predict_pack(tmp_path, layer=EVERYTHING, **checkpoint)
    expected = run(make_pack(tmp_path, "dense", tier="dense", **checkpoint))
    assert np.array_equal(run(path, slots=64), expected)
    assert np.array_equal(run(path, slots=512), expected)


@pytest.mark.parametrize("checkpoint", [{}, {"family": "opt"}, {"activation": "relu2", "bits": 8}], ids=str)
def test_with_the_oracles_threshold_the_result_is_the_exact_tiers(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    oracle = LayerSpec(threshold=float(np.nextafter(np.float32(0), np.float32(1))))
    path = make_predict_pack(tmp_path, score="gate", layer=oracle, **checkpoint)
    exact = make_pack(tmp_path, "exact", tier="exact", **checkpoint)
    assert np.array_equal(run(path, slots=64), run(exact, slots=64))
    costs = []
    for one in (path, exact):
        with flashsparse.load(one, slots=200) as engine:
            feed(engine)
            costs.append((engine.counters.misses, engine.counters.flash_bytes, engine.counters.active))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("score", ["gate_copy", "low_rank", "gate"])
def test_set_dense_and_tier_dense_give_the_dense_result(tmp_path: Path, score: str) -> None:
    path = make_predict_pack(tmp_path, score=score)
    expected = run(make_pack(tmp_path, "dense", tier="dense"))
    with flashsparse.load(path, slots=64) as engine:
        predicted = feed(engine)
        engine.set_dense(True)
        assert np.array_equal(feed(engine), expected)
        before = engine.counters.copy()
        engine.set_dense(False)
        assert np.array_equal(feed(engine), predicted) and not np.array_equal(predicted, expected)
        assert (engine.counters - before).predicted > 0
    with flashsparse.load(path, tier="dense") as engine:
        assert np.array_equal(feed(engine), expected)
        assert (engine.tier, engine.plan.slots, engine.plan.predictor) == ("dense", (0, 0, 0), 0)
        figures = engine.stats.to_dict()
        assert (figures["tier"], figures["predicted_density"], figures["predictor_precision"]) == ("dense", None, None)
        with pytest.raises(flashsparse.UsageError, match="no prediction to judge"):
            engine.judge(print)


def test_tiers_that_a_pack_cannot_run_in_are_refused(tmp_path: Path, pack: Path) -> None:
    with pytest.raises(flashsparse.UsageError, match="tier: 'exact' is not 'dense'"):
        flashsparse.load(pack, tier="exact")
    exact, dense = make_pack(tmp_path, "e"), make_pack(tmp_path, "d", tier="dense")
    with pytest.raises(flashsparse.UsageError, match="dense model's result already"):
        flashsparse.load(exact, tier="dense")
    assert np.array_equal(run(dense, tier="dense"), run(dense))


def reference_scores(path: Path, layer: int, x: np.ndarray) -> np.ndarray:
    """The scores of a layer by numpy, from the tensors of the predictor file."""
    manifest = Manifest.load(path)
    header = read_header(manifest.predictor_path)
    stored = {name: read_tensor(header, name) for name in header.tensors}
    assert manifest.predictor is not None
    spec, base, score = manifest.predictor.layers[layer], f"layers.{layer}", manifest.predictor.score
    bits, group = spec.bits or 0, spec.group_size or 0

    def product(name: str) -> np.ndarray:
        parts = (stored[f"{base}.{name}.{part}"] for part in ("weight", "scales", "biases"))
        return LowBit(*parts, bits, group).product(x) + stored.get(f"{base}.{name}.bias", np.float32(0))

    activation = (manifest.activation.name, manifest.activation.param)
    if score == "gate_copy":
        return selection.scores_from_gate(*activation, product("gate"))
    if score == "gate_up_copy":
        up = product("up") if manifest.gated else None
        return selection.scores_from_gate_up(*activation, product("gate"), up, stored[f"{base}.down_norm"])
    middle = x @ stored[f"{base}.fc1.weight"].astype(np.float32).T
    middle = np.maximum(middle, 0) if spec.relu else middle
    return middle @ stored[f"{base}.fc2.weight"].astype(np.float32).T + stored[f"{base}.fc2.bias"]


SCORED = [model for model, options in MODELS.items() if options.get("score") != "gate" and model != "mixed"]


@pytest.mark.parametrize("model", SCORED)
def test_scores_and_sets_are_those_of_the_formulas(tmp_path: Path, model: str) -> None:
    path = make_predict_pack(tmp_path, **MODELS[model])
    x = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    with flashsparse.load(path, slots=64) as engine:
        chooser: Any = engine._ffns[1].chooser
        scores = np.empty((9, 512), np.float32)
        chooser.predictor.score(x, scores)
        assert np.allclose(scores, reference_scores(path, 1, x), rtol=1e-4, atol=1e-4)
        spec = engine.manifest.predictor
        assert spec is not None
        expected = selection.select(scores, spec.selection, spec.layers[1].threshold, spec.layers[1].k)
        choice = chooser.choose(x)
        assert np.array_equal(choice.selected(9, 512), expected)
        assert choice.pairs(9) == expected.sum() and np.array_equal(choice.ids, np.flatnonzero(expected.any(axis=0)))


def test_a_layer_is_its_formula_over_the_chosen_neurons(tmp_path: Path) -> None:
    path = make_predict_pack(tmp_path, dtype="F32", layers={2: NOTHING})
    x = np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)
    weights = source_weights(tmp_path / "predict-source")
    with flashsparse.load(path, slots=64) as engine:
        for index in (0, 1, 2):
            layer = {name: values.astype(np.float64) for name, values in ffn(weights, "llama", index).items()}
            chosen = engine._ffns[index].chooser.choose(x).selected(5, 512)
            hidden = np.maximum(x @ layer["gate"].T, 0) * (x @ layer["up"].T) * chosen
            assert np.allclose(engine._ffns[index](x), hidden @ layer["down"].T, rtol=1e-4, atol=1e-5)
        assert not engine._ffns[2](x).any()


def test_one_slot_is_enough(pack: Path) -> None:
    with flashsparse.load(pack, slots=1) as engine, engine.session() as session:
        found = np.concatenate([session.logits(PROMPT), session.logits(STEPS[:1])])
    assert np.array_equal(found, run(pack, slots=512)[: len(found)])


def test_nothing_selected_anywhere_works(tmp_path: Path) -> None:
    path = make_predict_pack(tmp_path, layer=NOTHING)
    with flashsparse.load(path, slots=64) as engine:
        assert np.isfinite(feed(engine)).all()
        figures = engine.stats.to_dict()
        assert (figures["predicted_density"], figures["predictor_precision"], figures["flash_bytes"]) == (0.0, None, 0)


def test_a_layer_computed_whole_stays_in_memory_when_it_fits(tmp_path: Path) -> None:
    path = make_predict_pack(tmp_path, layers={0: LayerSpec(every=True)})
    with flashsparse.load(path, slots=64) as engine:
        assert engine.plan.slots == (0, 64, 64)
        expected = feed(engine)
        small = engine.plan.budget
        record = engine.plan.slot_bytes + SLOT_BYTES
    with flashsparse.load(path, dram=small + 640 * record, max_kv_size=512) as engine:
        assert engine.plan.slots[0] == 512 and min(engine.plan.slots[1:]) >= 64
        assert np.array_equal(feed(engine), expected)
        table = engine._ffns[0].table
        assert table is not None and len(table.resident()) == 512 <= engine.counters.misses


def test_slots_follow_the_calibrated_densities(tmp_path: Path) -> None:
    dense, thin = replace(COPY, density=0.6), replace(COPY, density=0.1)
    path = make_predict_pack(tmp_path, layer=thin, layers={1: dense})
    with flashsparse.load(path, slots=64, max_kv_size=512) as engine:
        floor, slot = engine.plan.budget, engine.plan.slot_bytes
        assert engine.plan.slots == (64, 64, 64)
        expected = feed(engine)
    with flashsparse.load(path, dram=floor + 288 * slot, max_kv_size=512) as engine:
        assert engine.plan.slots[0] == engine.plan.slots[2] and engine.plan.slots[1] > 4 * engine.plan.slots[0]
        assert 0 < engine.plan.predictor < engine.plan.resident and "predictor" in engine.plan.describe()
        assert np.array_equal(feed(engine), expected)
        assert engine.stats.calibrated_density == pytest.approx(0.8 / 3)


def judged(engine: Engine) -> list[LayerJudgement]:
    seen: list[LayerJudgement] = []
    engine.judge(seen.append)
    feed(engine)
    engine.judge(None)
    return seen


@pytest.mark.parametrize("model", ["gate_copy", "gate_copy, 4-bit records", "gate_copy, 1 bit, OPT", "gate"])
def test_judgements_are_true(tmp_path: Path, model: str) -> None:
    """Predicted as without judging; active and values against the dense run of the same pack, by its own numbers."""
    path = make_predict_pack(tmp_path, **MODELS[model])
    with flashsparse.load(path, slots=64) as engine:
        steps: list[list[int]] = []
        engine.observe(lambda layer, ids: steps.append(ids.tolist()))
        feed(engine)
        unjudged, steps[:] = list(steps), []
        seen = judged(engine)
        assert steps == unjudged
        for step, ids in zip(seen, unjudged, strict=True):
            assert np.flatnonzero(step.predicted.any(axis=0)).tolist() == ids
            assert step.predicted.dtype == step.active.dtype == bool and step.values.dtype == np.float32
            assert step.predicted.shape == step.values.shape and step.values.shape[1] == 512
            assert not step.values[~step.active].any() and 0.3 < step.active.mean() < 0.7
        assert engine.counters.predicted == 2 * sum(int(step.predicted.sum()) for step in seen)


def test_values_are_hidden_times_down_norm(tmp_path: Path) -> None:
    path = make_predict_pack(tmp_path, dtype="F32", score="gate_up_copy", mlp_bias=True)
    x = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    layer = {n: v.astype(np.float64) for n, v in ffn(source_weights(tmp_path / "predict-source"), "llama", 1).items()}
    gate = np.maximum(x @ layer["gate"].T + layer["gate.bias"], 0)
    with flashsparse.load(path, slots=64) as engine:
        seen: list[LayerJudgement] = []
        engine.judge(seen.append)
        engine._ffns[1](x)
        (step,) = seen
        assert step.layer == 1 and np.array_equal(step.active, gate != 0)
        source = source_weights(tmp_path / "predict-source")
        up = x @ layer["up"].T + source["model.layers.1.mlp.up_proj.bias"]
        expected = np.abs(gate * up) * np.linalg.norm(layer["down"], axis=0)
        assert np.allclose(step.values, expected, rtol=1e-4, atol=1e-5)


def test_drelu_is_active_where_its_gate_is(tmp_path: Path) -> None:
    with flashsparse.load(make_predict_pack(tmp_path, family="bamboo"), slots=64) as engine:
        seen = judged(engine)
        assert all(0.4 < step.active.mean() < 0.6 for step in seen)
        assert all(0.2 < (step.values > 0).mean() < 0.3 for step in seen)


def test_tier_exact_predicts_what_is_active(tmp_path: Path) -> None:
    path = make_pack(tmp_path, bits=8)
    with flashsparse.load(path, slots=64) as engine:
        expected = feed(engine)
        seen: list[LayerJudgement] = []
        engine.judge(seen.append)
        assert np.array_equal(feed(engine), expected)
        assert all(np.array_equal(step.predicted, step.active) for step in seen) and seen[0].values.any()


def test_judging_on_the_dense_path_keeps_the_dense_result(pack: Path) -> None:
    with flashsparse.load(pack, slots=64) as engine:
        engine.set_dense(True)
        expected = feed(engine)
        seen: list[LayerJudgement] = []
        engine.judge(seen.append)
        assert np.array_equal(feed(engine), expected)
        assert 0 < seen[-1].predicted.mean() < 1


def test_figures_of_a_run(tmp_path: Path, pack: Path) -> None:
    known = replace(COPY, density=0.25)
    with flashsparse.load(make_predict_pack(tmp_path, layer=known), slots=64) as engine, engine.session() as session:
        session.logits(PROMPT[:5])
        for token in PROMPT[:63]:
            session.logits([token])  # decoded one at a time
        assert engine.drift() is None
        session.logits([5])
        drift, stats = engine.drift(), engine.stats.to_dict()
        assert drift is not None and len(drift.layers) == 3
        assert drift.ratio == pytest.approx(sum(r for r in drift.layers if r is not None) / 3)
        assert 1.33 < drift.ratio < 4 and f"{drift.ratio:.2f} times" in str(drift.warning)
        assert stats["calibrated_density"] == 0.25 and 0 < float(str(stats["predicted_density"])) < 1
        assert 0 < float(str(stats["predictor_precision"])) <= 1
        assert replace(drift, ratio=1.1).warning is None and replace(drift, ratio=0.5).warning is not None
    with flashsparse.load(pack, slots=64) as engine:
        feed(engine)
        assert engine.drift() is None and engine.stats.to_dict()["calibrated_density"] is None


def test_native_kernels_agree_with_plain_mlx_operators(tmp_path: Path) -> None:
    path = make_predict_pack(tmp_path, dtype="F32")
    found = []
    for kernels in ("native", "reference"):
        with flashsparse.load(path, slots=64, kernels=kernels) as engine, engine.session() as session:
            seen: list[LayerJudgement] = []
            engine.judge(seen.append)
            found.append((session.logits(PROMPT[:10]), seen))
    (native, ours), (reference, theirs) = found
    assert np.abs(native - reference).max() <= 1e-4 * np.abs(reference).max()
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.predicted, other.predicted)
        assert np.allclose(one.values, other.values, rtol=1e-3, atol=1e-5)


def damaged(path: Path, change: Any) -> None:
    """Changes the tensors of the predictor file and gives it a matching entry in the manifest."""
    manifest = Manifest.load(path)
    header = read_header(manifest.predictor_path)
    tensors: Tensors = {name: (info.dtype, read_tensor(header, name)) for name, info in header.tensors.items()}
    change(tensors)
    files = manifest.files | {PREDICTOR: write_tensors(manifest.predictor_path, tensors)}
    replace(manifest, files=files).write()


def drop(tensors: Tensors) -> None:
    del tensors["layers.1.gate.scales"]


def shorten(tensors: Tensors) -> None:
    kind, values = tensors["layers.1.gate.weight"]
    tensors["layers.1.gate.weight"] = kind, values[:-1]


def add(tensors: Tensors) -> None:
    tensors["layers.3.gate.weight"] = tensors["layers.0.gate.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"layers\.1\.gate\.scales': missing"),
        (shorten, r"layers\.1\.gate\.weight': found U32 \[511, 4\], expected U32 \[512, 4\]"),
        (add, r"layers\.3\.gate\.weight'.*no such tensor"),
    ],
)
def test_wrong_predictor_files_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = make_predict_pack(tmp_path)
    damaged(path, change)
    with pytest.raises(flashsparse.PackError, match=message):
        flashsparse.load(path)


def test_truncated_and_absent_predictor_files_are_refused(tmp_path: Path) -> None:
    path = make_predict_pack(tmp_path)
    file = path / PREDICTOR
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(flashsparse.DamagedPackError, match=r"predictor\.safetensors: found"):
        flashsparse.load(path)
    file.unlink()
    with pytest.raises(flashsparse.DamagedPackError, match=r"predictor\.safetensors: missing"):
        flashsparse.load(path)


def test_a_threshold_that_is_no_number_is_refused(tmp_path: Path) -> None:
    for threshold in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="JSON"):
            make_predict_pack(tmp_path, f"pack{threshold}", layer=replace(COPY, threshold=threshold))


def test_scores_that_are_no_numbers_select_their_neurons(tmp_path: Path) -> None:
    """A damaged copy must show in the output, not hide: every neuron of a NaN row is computed."""
    path = make_predict_pack(tmp_path)

    def spoil(tensors: Tensors) -> None:
        tensors["layers.1.gate.scales"][1][7] = np.nan

    damaged(path, spoil)
    with flashsparse.load(path, slots=64) as engine:
        for step in judged(engine):
            assert step.layer != 1 or step.predicted[:, 7].all()


def test_scores_beyond_float32_select_their_neurons_quietly(tmp_path: Path) -> None:
    """Infinite and undefined products of a damaged copy are no numpy warnings on the user's terminal."""
    path = make_predict_pack(tmp_path, score="gate_up_copy")

    def spoil(tensors: Tensors) -> None:
        tensors["layers.1.up.scales"][1][7] = np.inf
        tensors["layers.1.down_norm"][1][8] = 3e38
        tensors["layers.1.down_norm"][1][9] = np.nan

    damaged(path, spoil)
    with flashsparse.load(path, slots=64) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in judged(engine):
            assert step.layer != 1 or step.predicted[:, 9].all()


@pytest.mark.parametrize("score", ["gate_copy", "gate"])
def test_layers_that_are_computed_whole_do_not_count_as_drift(tmp_path: Path, score: str) -> None:
    known = replace(default_layer(score), density=0.25)
    path = make_predict_pack(tmp_path, score=score, layer=known, layers={1: LayerSpec(every=True, density=1.0)})
    with flashsparse.load(path, slots=64) as engine, engine.session() as session:
        for token in PROMPT[:64]:
            session.logits([token])
        drift = engine.drift()
        assert drift is not None and drift.layers[1] is None
        assert drift.ratio == pytest.approx(sum(ratio for ratio in drift.layers if ratio is not None) / 2)


MEASURE = """
import sys, flashsparse
with flashsparse.load(sys.argv[1], dram=int(sys.argv[2])) as engine, engine.session() as session:
    pieces = list(session.generate(list(range(3, 153)), max_tokens=40))
    print(pieces[-1].stats.peak_memory_bytes - engine.runtime_bytes, engine.plan.budget)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
@pytest.mark.parametrize("score", ["gate_copy", pytest.param("gate_up_copy", marks=pytest.mark.slow)])
def test_peak_footprint_less_runtime_stays_within_the_budget(tmp_path: Path, score: str) -> None:
    path = make_predict_pack(tmp_path, score=score, hidden=256, intermediate=2048, vocab=512)
    with pytest.raises(flashsparse.BudgetError) as refused:
        flashsparse.load(path, dram=1)
    budget = refused.value.smallest + 500_000
    command = [sys.executable, "-c", MEASURE, str(path), str(budget)]
    used, limit = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 0 < used <= limit == budget
