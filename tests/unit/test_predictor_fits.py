"""Closed-form fits of one layer: copies, low rank and hints, against the best there can be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import converter.predictors.products as products
from converter.predictors.compensated import quantize_compensated
from converter.predictors.copies import fit_gate_copy, fit_gate_up_copy, weighed
from converter.predictors.lookahead import (
    HintCounts,
    fit_hint,
    fit_plan,
    hold_out,
    inputs,
    measure_hint,
    window_sets,
)
from converter.predictors.low_rank import (
    LowRank,
    Moments,
    _leading,
    input_covariance,
    reduced_rank_regression,
    truncated_svd,
    whitened_svd,
)
from converter.predictors.train import Settings
from flashsparse.errors import ConvertError, UsageError
from flashsparse.sparsity.low_bit import best_scales, bias_of, codes_of, round_input
from tests.unit.random_layer import TOKENS, WIDTH, D, Layer, numbers


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


def error(fit: LowRank, x: np.ndarray, target: np.ndarray) -> float:
    return float(((fit.logits(x) - target) ** 2).sum())


def test_products_use_blas_here_and_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 7)).astype(np.float32), rng.standard_normal((3, 7)).astype(np.float32).T
    used = []
    on_gpu = products._on_gpu
    monkeypatch.setattr(products, "_on_gpu", lambda *given: used.append(given) or on_gpu(*given))
    for metal in (False, True):
        monkeypatch.setattr(products, "_metal", lambda metal=metal: metal)
        out = np.empty((5, 3), np.float32)
        assert products.matmul(a, b, out) is out
        np.testing.assert_allclose(out, a @ b, rtol=1e-5)
        np.testing.assert_allclose(products.matmul(a, b), a @ b, rtol=1e-5)
        assert products.matmul(a.astype(np.float64), b.astype(np.float64)).dtype == np.float64
    assert len(used) == 2


def test_a_gate_copy_scores_with_its_bias(layer: Layer) -> None:
    copy = fit_gate_copy(layer.gate, layer.bias, 4, 64, layer.moments().importance())
    tensors = copy.tensors()
    assert {name: (values.dtype.str, values.shape) for name, values in tensors.items()} == {
        "gate.weight": ("<u4", (WIDTH, D * 4 // 32)),
        "gate.scales": ("<f2", (WIDTH, 1)),
        "gate.biases": ("<f2", (WIDTH, 1)),
        "gate.bias": ("<f4", (WIDTH,)),
    }
    expected = round_input(layer.x, 64) @ copy.gate.dequantize().T + layer.bias
    np.testing.assert_allclose(copy.scores("relu", None, layer.x), expected, atol=1e-3)
    assert "gate.bias" not in fit_gate_copy(layer.gate, None, 2, 32).tensors()


def swept_slowly(weight: np.ndarray, bits: int, group: int, moment: np.ndarray) -> np.ndarray:
    """GPTQ by its definition: after each column the others take up its error as the inverse of what remains says."""
    work, out, power = weight.astype(np.float64), np.empty_like(weight), np.diagonal(moment)
    for column in range(weight.shape[1]):
        if column % group == 0:
            importance = (power / power.mean()).astype(np.float32)[None, column : column + group]
            scale = best_scales(work[:, None, column : column + group].astype(np.float32), importance, bits)[:, 0]
        codes = codes_of(work[:, column].astype(np.float32), scale, bits)
        out[:, column] = codes * scale.astype(np.float32) + bias_of(scale, bits).astype(np.float32)
        inverse = np.linalg.inv(moment[column:, column:])
        work[:, column:] -= np.outer(work[:, column] - out[:, column], inverse[0] / inverse[0, 0])
    return out


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_compensated_copies_are_no_worse_than_gptqs_sweep(bits: int, layer: Layer) -> None:
    moment = input_covariance(layer.moments(), False, 0.01)
    found = quantize_compensated(layer.gate, bits, 32, moment, damping=1e-6).dequantize()
    errors = [(each - layer.gate) for each in (found, swept_slowly(layer.gate, bits, 32, moment))]
    ours, theirs = (np.einsum("id,de,ie->", e, moment, e) for e in errors)
    assert ours <= theirs


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_errors_that_cancel_leave_less_in_the_output(bits: int, layer: Layer) -> None:
    moments = Moments(D)
    x = layer.x + np.linspace(-1, 1, D, dtype=np.float32)  # FFN inputs have a mean
    moments.add(x[:400])
    judged, target = x[400:], x[400:] @ layer.gate.T
    copies = [fit_gate_copy(layer.gate, None, bits, 64, moments, compensate) for compensate in (True, False)]
    sums = [((copy.scores("relu", None, judged) - target) ** 2).sum() for copy in copies]
    assert sums[0] < (0.7 if bits == 1 else 0.6) * sums[1]
    assert copies[0].gate.nbytes == copies[1].gate.nbytes
    weighted = fit_gate_copy(layer.gate, None, bits, 64, moments.importance())
    assert np.array_equal(weighted.gate.words, copies[1].gate.words)


def test_a_gates_bias_takes_up_the_mean_error_of_its_copy(layer: Layer) -> None:
    moments = Moments(D)
    x = layer.x + np.linspace(-2, 2, D, dtype=np.float32)
    moments.add(x)
    copy = fit_gate_up_copy(layer.gate, layer.bias, layer.up, layer.bias, layer.bias, 2, 64, moments)
    assert copy.bias is not None and copy.up is not None and copy.up_bias is not None
    for part, bias, weight in ((copy.gate, copy.bias, layer.gate), (copy.up, copy.up_bias, layer.up)):
        error = x @ part.dequantize().T + bias - (x @ weight.T + layer.bias)
        assert np.abs(error.mean(axis=0)).max() < 1e-3 < np.abs(bias - layer.bias).max()


def test_weights_and_layouts_that_cannot_be_swept_are_named(layer: Layer) -> None:
    broken = layer.gate.copy()
    broken[7, 3] = np.nan
    with pytest.raises(UsageError, match="row 7"):
        fit_gate_copy(broken, None, 2, 64, layer.moments())
    with pytest.raises(UsageError, match="group size 128"):
        fit_gate_copy(layer.gate, None, 2, 128, layer.moments())
    with pytest.raises(UsageError, match="no tokens"):
        fit_gate_copy(layer.gate, None, 2, 64, Moments(D))


def test_gate_and_up_copies_score_the_value(layer: Layer) -> None:
    norms = np.linalg.norm(layer.down, axis=0)
    copy = fit_gate_up_copy(layer.gate, None, layer.up, layer.bias, norms, 2, 32)
    assert set(copy.tensors()) == {
        "gate.weight", "gate.scales", "gate.biases", "up.weight", "up.scales", "up.biases", "up.bias", "down_norm",
    }  # fmt: skip
    assert copy.up is not None
    gate, up = (round_input(layer.x, 32) @ part.dequantize().T for part in (copy.gate, copy.up))
    expected = np.maximum(gate, 0) * np.abs(up + layer.bias) * norms
    np.testing.assert_allclose(copy.scores("relu", None, layer.x), expected, rtol=1e-3, atol=1e-3)
    alone = fit_gate_up_copy(layer.gate, layer.bias, None, None, norms, 2, 32)
    assert set(alone.tensors()) == {"gate.weight", "gate.scales", "gate.biases", "gate.bias", "down_norm"}
    expected = np.maximum(gate + layer.bias, 0) * norms
    np.testing.assert_allclose(alone.scores("relu", None, layer.x), expected, rtol=1e-3, atol=1e-3)


def test_the_plain_svd_is_the_best_in_the_frobenius_norm(layer: Layer) -> None:
    left, values, right = np.linalg.svd(layer.gate.astype(np.float64), full_matrices=False)
    fit = truncated_svd(layer.gate, 10)
    np.testing.assert_allclose(fit.fc2 @ fit.fc1, (left[:, :10] * values[:10]) @ right[:10], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(fit.fc1, axis=1), np.linalg.norm(fit.fc2, axis=0), rtol=1e-5)


def test_the_whitened_svd_is_the_best_on_the_inputs(layer: Layer) -> None:
    target = layer.x @ layer.gate.T
    values = np.linalg.svd(target.astype(np.float64), compute_uv=False)
    best = float((values[10:] ** 2).sum())  # no map of rank 10 does better on these outputs
    whitened = error(whitened_svd(layer.gate, 10, layer.moments()), layer.x, target)
    assert 0.9999 * best < whitened < 1.01 * best
    assert whitened < 0.8 * error(truncated_svd(layer.gate, 10), layer.x, target)


def test_a_bias_takes_up_the_error_of_the_mean(layer: Layer) -> None:
    shifted = Moments(D)
    x = layer.x + np.linspace(-2, 2, D, dtype=np.float32)
    shifted.add(x)
    target = x @ layer.gate.T + layer.bias
    with_bias = whitened_svd(layer.gate, 10, shifted, layer.bias)
    assert with_bias.bias is not None
    np.testing.assert_allclose(with_bias.logits(x).mean(axis=0), target.mean(axis=0), atol=1e-3)
    without = whitened_svd(layer.gate, 10, shifted)
    without = LowRank(without.fc1, without.fc2, layer.bias)
    assert error(with_bias, x, target) < error(without, x, target)


def test_regression_is_the_best_map_of_its_rank(layer: Layer) -> None:
    rng = np.random.default_rng(1)
    target = (np.tanh(layer.x) @ rng.standard_normal((D, WIDTH)) + 3).astype(np.float32)
    moments = Moments(D, WIDTH)
    moments.add(layer.x[:200], target[:200])
    moments.add(layer.x[200:], target[200:])
    fit = reduced_rank_regression(moments, 12)
    x, g = layer.x - layer.x.mean(axis=0), (target - target.mean(axis=0)).astype(np.float64)
    full = x @ np.linalg.lstsq(x, g, rcond=None)[0]
    left, values, right = np.linalg.svd(full, full_matrices=False)
    best = float(((left[:, :12] * values[:12]) @ right[:12] - g).__pow__(2).sum())
    assert 0.9999 * best < error(fit, layer.x, target) < 1.01 * best
    own = Moments(D, WIDTH)
    own.add(layer.x, layer.x @ layer.gate.T + layer.bias)
    same, svd = reduced_rank_regression(own, 8), whitened_svd(layer.gate, 8, layer.moments(), layer.bias)
    np.testing.assert_allclose(same.logits(layer.x), svd.logits(layer.x), atol=0.2)  # but for the damping


@pytest.mark.parametrize("shape", [(96, 64), (40, 64)])
def test_full_rank_is_the_gate_itself(shape: tuple[int, int], layer: Layer) -> None:
    gate = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    for fit in (truncated_svd(gate, min(shape)), whitened_svd(gate, min(shape), layer.moments())):
        np.testing.assert_allclose(fit.fc2 @ fit.fc1, gate, atol=1e-3)
        found, true = fit.logits(layer.x) > 0, layer.x @ gate.T > 0
        assert (found & true).sum() / true.sum() > 0.999


def test_the_bias_must_be_in_the_predictor(layer: Layer) -> None:
    true = layer.x @ layer.gate.T + layer.bias > 0
    fit = truncated_svd(layer.gate, D, layer.bias)
    without = LowRank(fit.fc1, fit.fc2)
    assert ((fit.logits(layer.x) > 0) != true).mean() < 1e-3
    assert ((without.logits(layer.x) > 0) != true).mean() > 0.1


def test_subspace_iteration_is_nearly_exact() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((1300, 1100))  # flat: the hard case
    gram = weight.T @ weight
    vectors = _leading(gram, 40)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(40), atol=1e-9)
    missed = np.trace(gram) - np.trace(vectors.T @ gram @ vectors)
    assert missed < 1.01 * np.linalg.eigvalsh(gram)[:-40].sum()


def test_what_is_stored_is_float16(layer: Layer) -> None:
    fit = truncated_svd(layer.gate, 4, layer.bias)
    tensors = fit.tensors()
    assert [tensors[f"{name}.weight"].dtype for name in ("fc1", "fc2")] == [np.float16, np.float16]
    assert np.array_equal(fit.stored().fc2, tensors["fc2.weight"].astype(np.float32))
    assert np.array_equal(tensors["fc2.bias"], layer.bias)
    with pytest.raises(ConvertError, match="fc1"):
        LowRank(np.full((1, 2), 1e6, np.float32), fit.fc2).tensors()


@pytest.mark.parametrize("rank", [0, D + 1])
def test_a_rank_that_cannot_be_is_refused(rank: int, layer: Layer) -> None:
    with pytest.raises(UsageError, match=f"rank {rank}: expected 1 to {D}"):
        truncated_svd(layer.gate, rank)
    with pytest.raises(UsageError, match="no tokens"):
        whitened_svd(layer.gate, 4, Moments(D))


def test_inputs_of_hints_are_scaled_residuals_or_the_ffn_input_itself() -> None:
    states = np.array([[3.0, -4.0], [0.0, 0.0]], np.float32)
    assert np.array_equal(inputs("next", states), states)
    for source in ("before", "plan"):
        np.testing.assert_allclose(inputs(source, states), [[3 / 12.5**0.5, -4 / 12.5**0.5], [0, 0]], rtol=1e-6)
    with pytest.raises(UsageError, match="'after'"):
        inputs("after", states)


@pytest.mark.parametrize("source", ["next", "before"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_hint_names_the_set_that_another_state_foretells(source: str, trained: bool, layer: Layer) -> None:
    rng = np.random.default_rng(5)
    states = layer.x if source == "next" else inputs("before", layer.x) * rng.uniform(1, 9, (TOKENS, 1))
    low = layer.gate[:, :8] @ rng.standard_normal((8, D)).astype(np.float32)  # what follows has rank 8
    gate = inputs(source, states) @ low.T - 1 + 0.1 * rng.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    selected = gate > 0
    fitted, judged = hold_out(TOKENS, 0.25)
    hint = fit_hint(source, states[fitted], gate[fitted], selected[fitted], 8, 0.95,
                    Settings(epochs=3, rate=1e-4) if trained else None)  # fmt: skip
    counts = measure_hint(hint.hinted(states[judged]), selected[judged])
    assert counts.tokens == 150 and counts.coverage > 0.9
    assert counts.extra_per_token < 0.1 * counts.selected / counts.tokens
    chance = measure_hint(hint.hinted(rng.permutation(states[judged])), selected[judged])
    assert chance.coverage < counts.coverage - 0.1
    with pytest.raises(UsageError, match="pairs"):
        fit_hint(source, states, gate[:5], selected, 8)


def test_a_plan_has_a_hint_per_layer_and_hints_of_a_poor_one_are_many(layer: Layer) -> None:
    noise = numbers((TOKENS, WIDTH), 6).astype(np.float32)
    known = inputs("plan", layer.x) @ layer.gate.T
    targets = [(3, known, known > 1), (4, noise, noise > 1)]
    plan = fit_plan(layer.x, iter(targets), 16, goal=0.9)
    counts = {number: measure_hint(plan[number].hinted(layer.x), selected) for number, _, selected in targets}
    assert list(plan) == [3, 4] and all(hint.source == "plan" for hint in plan.values())
    assert min(found.coverage for found in counts.values()) >= 0.9
    assert counts[4].extra_per_token > 3 * counts[3].extra_per_token


def test_windows_hold_the_sets_before_a_token_and_never_another_sequences() -> None:
    selected = np.eye(6, dtype=bool)
    assert [np.flatnonzero(row).tolist() for row in window_sets(selected, 2)] == [
        [],
        [0],
        [0, 1],
        [1, 2],
        [2, 3],
        [3, 4],
    ]
    found = window_sets(selected, 4, starts=[0, 2, 3])
    assert [np.flatnonzero(row).tolist() for row in found] == [[], [0], [], [], [3], [3, 4]]
    assert not window_sets(selected, 0).any()


def test_counts_of_hints_by_hand() -> None:
    selected = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool)
    hinted = np.array([[1, 0, 1, 0], [0, 0, 1, 1]], bool)
    resident = np.array([[0, 0, 0, 0], [0, 1, 0, 1]], bool)
    alone = measure_hint(hinted, selected)
    assert alone == HintCounts(tokens=2, selected=4, covered=2, reads=4, extra=2)
    assert (alone.coverage, alone.reads_per_token, alone.extra_per_token) == (0.5, 2, 1)
    assert measure_hint(hinted, selected, resident) == HintCounts(tokens=2, selected=4, covered=3, reads=3, extra=1)
    none = measure_hint(hinted[:0], selected[:0])
    assert (none.coverage, none.reads_per_token, none.extra_per_token) == (1, 0, 0)


def test_the_tokens_held_out_are_the_last() -> None:
    assert hold_out(100, 0.1) == (slice(0, 90), slice(90, 100))
    assert hold_out(2, 0.01) == (slice(0, 1), slice(1, 2))
    for tokens, share in ((1, 0.5), (10, 1.0)):
        with pytest.raises(UsageError, match="hold out"):
            hold_out(tokens, share)


def test_rows_are_weighed_by_what_a_neuron_is_worth(layer: Layer) -> None:
    layer.down[:, ::3] *= 4
    weights: Any = SimpleNamespace(gate=layer.gate, up=layer.up, down_norms=np.linalg.norm(layer.down, axis=0))
    copy = fit_gate_copy(layer.gate, layer.bias, 3, 64, layer.moments())
    by_value = weighed(copy, weights, "relu", None)
    plain, found = (each.scores("relu", None, layer.x) for each in (copy, by_value))
    worth = weights.down_norms * np.linalg.norm(layer.up, axis=1)
    np.testing.assert_allclose(found, plain * worth / worth.mean(), rtol=2e-3, atol=0.1)  # scales are of 16 bits
    gate, up = layer.x @ layer.gate.T + layer.bias, layer.x @ layer.up.T
    values = np.maximum(gate, 0) * np.abs(up) * weights.down_norms
    kept = [values[one >= np.sort(one, axis=None)[-one.size // 20]].sum() for one in (plain, found)]
    assert kept[1] > 1.05 * kept[0]


@pytest.mark.parametrize(("name", "param", "power"), [("relu2", None, 0.5), ("drelu", None, 1), ("fatrelu", 0.0, 1)])
def test_weighing_follows_the_activation(layer: Layer, name: str, param: float | None, power: float) -> None:
    weights: Any = SimpleNamespace(gate=None, up=layer.gate, down_norms=np.geomspace(1, 9, WIDTH, dtype=np.float32))
    copy = fit_gate_copy(layer.gate, layer.bias, 4, 64)
    found = weighed(copy, weights, name, param)
    assert found.bias is not None and copy.bias is not None and found.gate.scales.dtype == np.float16
    worth = weights.down_norms**power
    np.testing.assert_allclose(found.bias / copy.bias, worth / worth.mean(), rtol=1e-5)


@pytest.mark.parametrize(("name", "param"), [("silu", None), ("fatrelu", 0.01)])
def test_scores_whose_size_counts_are_not_weighed(layer: Layer, name: str, param: float | None) -> None:
    weights: Any = SimpleNamespace(gate=None, up=layer.gate, down_norms=np.linalg.norm(layer.down, axis=0))
    copy = fit_gate_copy(layer.gate, layer.bias, 2, 64)
    assert weighed(copy, weights, name, param) is copy


def test_neurons_that_are_worth_nothing_or_everything(layer: Layer) -> None:
    copy = fit_gate_copy(layer.gate, None, 2, 64)
    for one, rest in ((0, 0), (1e9, 1), (np.inf, 1)):
        norms = np.where(np.arange(WIDTH) == 3, np.float32(one), np.float32(rest))
        weights: Any = SimpleNamespace(gate=None, up=layer.gate, down_norms=norms)
        found = weighed(copy, weights, "relu", None)
        assert np.isfinite(found.scores("relu", None, layer.x)).all()
        assert (np.sign(found.gate.scales) == np.sign(copy.gate.scales)).all()


def test_rows_whose_scales_would_lose_their_digits_stay(layer: Layer) -> None:
    gate = (layer.gate / np.abs(layer.gate).max()).astype(np.float32)
    gate[2] *= np.float32(5e-5)  # a scale of few digits
    gate[5] *= np.float32(3e4)  # one beyond the type, where it is weighed
    copy = fit_gate_copy(gate, None, 2, 64)
    weights: Any = SimpleNamespace(gate=None, up=gate, down_norms=np.where(np.arange(WIDTH) == 5, np.float32(1e9), 1))
    ratios = weighed(copy, weights, "relu", None).gate.scales.astype(np.float32) / copy.gate.scales
    assert (ratios[[2, 5]] == 1).all()
    assert (np.delete(ratios, [2, 5], axis=0) == 1 / 16).all()
