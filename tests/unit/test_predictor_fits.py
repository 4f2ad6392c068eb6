"""Fits of one layer's predictor: copies, closed forms, training, thresholds, sizes and hints, on hand-made layers."""

from __future__ import annotations

import numpy as np
import pytest

import converter.predictors.products as products
from converter.predictors.copies import fit_gate_copy, fit_gate_up_copy
from converter.predictors.low_rank import (
    LowRank,
    Moments,
    _leading,
    rectified,
    reduced_rank_regression,
    truncated_svd,
    whitened_svd,
)
from converter.predictors.sizing import EVERY, Candidate, choose, copy_bytes, cost, low_rank_bytes
from converter.predictors.thresholds import bisect_target, calibrate, measure
from converter.predictors.train import AdamW, Settings, gradients, labels, loss, negative_weight, split, train
from flashsparse.errors import ConvertError, NumericError, UsageError
from flashsparse.sparsity.low_bit import round_input
from flashsparse.sparsity.selection import top

D, WIDTH, TOKENS = 64, 96, 600


class Layer:
    """Inputs with very unequal directions, a random gate with a bias, an up and a down projection."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        mix = rng.standard_normal((D, D)) * np.geomspace(3, 0.05, D)
        self.x = (rng.standard_normal((TOKENS, D)) @ mix.T / 4).astype(np.float32)
        self.gate, self.up = rng.standard_normal((2, WIDTH, D)).astype(np.float32)
        self.bias = (rng.standard_normal(WIDTH) - 6).astype(np.float32)
        self.down = rng.standard_normal((D, WIDTH)).astype(np.float32)

    def moments(self) -> Moments:
        found = Moments(D)
        for start in range(0, TOKENS, 128):
            found.add(self.x[start : start + 128])
        return found


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


def test_gate_and_up_copies_score_the_value(layer: Layer) -> None:
    copy = fit_gate_up_copy(layer.gate, None, layer.up, layer.down, 2, 32)
    assert set(copy.tensors()) == {
        "gate.weight", "gate.scales", "gate.biases", "up.weight", "up.scales", "up.biases", "down_norm",
    }  # fmt: skip
    assert copy.up is not None
    gate, up = (round_input(layer.x, 32) @ part.dequantize().T for part in (copy.gate, copy.up))
    norms = np.linalg.norm(layer.down, axis=0)
    expected = np.maximum(gate, 0) * np.abs(up) * norms
    np.testing.assert_allclose(copy.scores("relu", None, layer.x), expected, rtol=1e-3, atol=1e-3)
    alone = fit_gate_up_copy(layer.gate, layer.bias, None, layer.down, 2, 32)
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


# Training.


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_loss(relu: bool, bias: bool) -> None:
    x, wanted = numbers((7, 5), 0), numbers((7, 6), 1) > 0.7
    parameters = {"fc1": numbers((3, 5), 2), "fc2": numbers((6, 3), 3)} | ({"bias": numbers((6,), 4)} if bias else {})

    def value() -> float:
        z = x @ parameters["fc1"].T
        return loss((np.maximum(z, 0) if relu else z) @ parameters["fc2"].T + parameters.get("bias", 0), wanted, 0.005)

    found = gradients(parameters, x, wanted, relu, 0.005)
    assert found.keys() == parameters.keys()
    for name, values in parameters.items():
        for index in np.ndindex(values.shape):
            kept = values[index]
            ends = []
            for step in (1e-6, -1e-6):
                values[index] = kept + step
                ends.append(value())
            values[index] = kept
            assert found[name][index] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


def test_the_loss_weighs_positives_one_and_negatives_with_the_density() -> None:
    wanted = np.array([[True, False], [False, False]])
    probabilities = np.array([[0.5, 0.25], [0.75, 0.5]])
    weight = 0.25 + 0.005
    expected = -(np.log(0.5) + weight * (np.log(0.75) + np.log(0.25) + np.log(0.5))) / 4
    assert negative_weight(wanted, 0.005) == pytest.approx(weight)
    assert loss(np.log(probabilities / (1 - probabilities)), wanted, 0.005) == pytest.approx(expected)
    # the gradient of a negative's logit is the sigmoid's times that weight
    found = gradients({"fc1": np.zeros((1, 1)), "fc2": np.ones((2, 1)), "bias": np.zeros(2)}, np.ones((2, 1)),
                      wanted, False, 0.005)  # fmt: skip
    np.testing.assert_allclose(found["bias"] * 4, [-0.5 + 0.5 * weight, 2 * 0.5 * weight])


def test_adamw_takes_the_published_steps() -> None:
    parameters = {"fc1": np.array([[1.0]]), "bias": np.array([1.0])}
    optimizer = AdamW(parameters, rate=0.1, decay=0.01)
    optimizer.step({"fc1": np.array([[4.0]]), "bias": np.array([-4.0])})
    # corrected for their start at 0, the averages are the gradient and its square: a step of the rate
    assert parameters["fc1"][0, 0] == pytest.approx(1 * (1 - 0.001) - 0.1)
    assert parameters["bias"][0] == pytest.approx(1.1)
    optimizer.step({"fc1": np.array([[2.0]]), "bias": np.array([0.0])})
    first = (0.9 * 0.1 * 4 + 0.1 * 2) / (1 - 0.81)
    second = (0.999 * 0.001 * 16 + 0.001 * 4) / (1 - 0.999**2)
    assert parameters["fc1"][0, 0] == pytest.approx(0.899 * 0.999 - 0.1 * first / np.sqrt(second))


def test_training_learns_repeats_and_keeps_its_best(layer: Layer) -> None:
    wanted = layer.x @ layer.gate.T > 4
    settings = Settings(epochs=12, batch=64, rate=5e-3, held_out=0.2)
    seen = []
    trained = train(layer.x, wanted, 16, settings=settings, progress=lambda number, epoch: seen.append(epoch))
    again = train(layer.x, wanted, 16, settings=settings)
    assert np.array_equal(trained.predictor.fc2, again.predictor.fc2)
    recalls = [epoch.counts.recall for epoch in trained.epochs]
    assert tuple(seen) == trained.epochs and trained.best == int(np.argmax(recalls))
    assert trained.counts.recall > 0.8 and trained.counts.density < 0.5
    assert trained.epochs[-1].loss < trained.epochs[0].loss
    other = train(layer.x, wanted, 16, settings=Settings(epochs=1, seed=1))
    assert not np.array_equal(other.predictor.fc1, trained.predictor.fc1)


def test_training_stops_when_recall_is_enough_or_does_not_rise(layer: Layer) -> None:
    true = layer.x @ layer.gate.T > 0
    exact = train(layer.x, true, D, start=truncated_svd(layer.gate, D), settings=Settings(rate=1e-5))
    assert len(exact.epochs) == 1 and exact.counts.recall > 0.99
    nothing = train(layer.x, np.zeros_like(true), 4, settings=Settings(epochs=20, enough=1.0))
    assert len(nothing.epochs) == 6 and nothing.best == 0  # recall of nothing is 1 at once


def test_the_whitened_start_is_ahead_and_a_bias_is_trained(layer: Layer) -> None:
    wanted = layer.x @ layer.gate.T + layer.bias > 0
    moments = layer.moments()
    settings = Settings(epochs=1, rate=1e-4)
    started = train(layer.x, wanted, 16, start=whitened_svd(layer.gate, 16, moments, layer.bias), settings=settings)
    without = train(layer.x, wanted, 16, start=whitened_svd(layer.gate, 16, moments), settings=settings)
    given = train(layer.x, wanted, 16, bias=layer.bias, settings=settings)
    assert started.epochs[0].loss < 0.7 * without.epochs[0].loss
    assert without.predictor.bias is None and given.predictor.bias is not None
    assert not np.array_equal(given.predictor.bias, layer.bias)


def test_a_linear_start_serves_a_network_with_relu(layer: Layer) -> None:
    linear = truncated_svd(layer.gate, 8, layer.bias)
    split_in_two = rectified(linear)
    assert split_in_two.relu and split_in_two.rank == 16
    np.testing.assert_allclose(split_in_two.logits(layer.x), linear.logits(layer.x), atol=1e-3)
    wanted = layer.x @ layer.gate.T > 2
    trained = train(layer.x, wanted, 16, relu=True, start=split_in_two, settings=Settings(epochs=2))
    assert trained.predictor.relu
    with pytest.raises(UsageError, match="relu False"):
        train(layer.x, wanted, 8, relu=True, start=linear)


def test_training_that_cannot_start_or_diverges_says_so(layer: Layer) -> None:
    with pytest.raises(UsageError, match="two or more"):
        train(layer.x[:1], np.ones((1, WIDTH), bool), 4)
    with pytest.raises(NumericError, match="lower the learning rate"), np.errstate(all="ignore"):
        train(layer.x, layer.x @ layer.gate.T > 0, 4, settings=Settings(rate=1e30, epochs=3))


def test_the_split_holds_out_its_share_and_shares_nothing() -> None:
    kept, judged = split(1000, 0.05, np.random.default_rng(0))
    assert len(judged) == 50 and sorted([*kept, *judged]) == list(range(1000))
    assert [len(part) for part in split(2, 0.05, np.random.default_rng(0))] == [1, 1]


def test_labels_of_each_kind() -> None:
    activation = np.array([[0.0, 1.0, 4.0, 0.0], [3.0, 0.0, 2.0, 0.0]])
    hidden, norms = activation * [[1, -9, 1, 1]], np.array([1.0, 1.0, 1.0, 5.0])
    assert labels("active", activation, hidden, norms).tolist() == (activation != 0).tolist()
    assert labels("clip", activation, hidden, norms, 0.25).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert labels("value", activation, hidden, norms, 0.25).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    assert labels("value", activation, hidden, norms).sum() == 2  # 0.4 of the active half, rounded up
    assert labels("clip", activation, hidden, norms, 1.0).tolist() == (activation != 0).tolist()
    for kind, share in (("most", None), ("value", 0.0), ("clip", 1.5)):
        with pytest.raises(UsageError, match="label"):
            labels(kind, activation, hidden, norms, share)
    with pytest.raises(UsageError, match='try "value"'):
        labels("active", activation + 5, hidden, norms)


# Thresholds.


class Sample:
    """Scores that know the values only in part; a tenth of the neurons is active."""

    def __init__(self, tokens: int = 150, width: int = 80) -> None:
        rng = np.random.default_rng(0)
        gate = rng.standard_normal((tokens, width)).astype(np.float32) - 1.2
        self.active = gate > 0
        self.values = np.maximum(gate, 0) * rng.random((tokens, width), dtype=np.float32)
        self.scores = (gate + 0.5 * rng.standard_normal((tokens, width))).astype(np.float32)

    def reached(self, target: str, predicted: np.ndarray) -> float:
        if target == "density":
            return float(predicted.mean())
        if target == "recall":
            return float((predicted & self.active).sum() / self.active.sum())
        return float(self.values[predicted].sum(dtype=np.float64) / self.values.sum(dtype=np.float64))


@pytest.mark.parametrize("target", ["value_recall", "recall", "density"])
@pytest.mark.parametrize("goal", [0.1, 0.5, 0.9, 0.98, 1.0])
def test_the_threshold_is_the_highest_that_reaches_the_goal(target: str, goal: float) -> None:
    sample = Sample()
    found = calibrate(sample.scores, sample.values, sample.active, target, goal)
    assert found.threshold is not None and found.k is None
    predicted = sample.scores >= np.float32(found.threshold)
    assert sample.reached(target, predicted) >= goal * (1 - 1e-9)
    higher = sample.scores > np.float32(found.threshold)
    assert sample.reached(target, higher) < goal
    assert found.density == predicted.mean()
    assert found.recall == pytest.approx(sample.reached("recall", predicted))
    assert found.value_recall == pytest.approx(sample.reached("value_recall", predicted))
    assert found.precision == pytest.approx((predicted & sample.active).sum() / predicted.sum())


@pytest.mark.parametrize("target", ["value_recall", "recall", "density"])
@pytest.mark.parametrize("goal", [0.1, 0.5, 0.9, 1.0])
def test_k_is_the_smallest_that_reaches_the_goal(target: str, goal: float) -> None:
    sample = Sample()
    found = calibrate(sample.scores, sample.values, sample.active, target, goal, "topk")
    assert found.k is not None and found.threshold is None
    assert sample.reached(target, top(sample.scores, found.k)) >= goal * (1 - 1e-9)
    assert sample.reached(target, top(sample.scores, found.k - 1)) < goal


@pytest.mark.parametrize("target", ["value_recall", "recall", "density"])
def test_both_rules_together_still_reach_the_goal_and_bound_each_token(target: str) -> None:
    sample = Sample()
    found = calibrate(sample.scores, sample.values, sample.active, target, 0.9 if target != "density" else 0.1,
                      "topk_and_threshold")  # fmt: skip
    assert found.k is not None and found.threshold is not None
    above = sample.scores >= np.float32(found.threshold)
    capped = above & top(sample.scores, found.k)
    assert found.density == capped.mean() and found.k < above.sum(axis=1).max()
    assert getattr(found, target) >= (0.9 if target != "density" else 0.099)


def test_a_layer_where_nothing_is_active_selects_nothing() -> None:
    scores = np.array([[1.0, -2.0, 3.0]], np.float32)
    zeros, nothing = np.zeros((1, 3), np.float32), np.zeros((1, 3), bool)
    for target in ("value_recall", "recall"):
        found = calibrate(scores, zeros, nothing, target, 0.98)
        assert found.threshold == np.nextafter(np.float32(3), np.float32(4)) and found.density == 0
        assert (found.recall, found.value_recall, found.precision) == (1, 1, 1)
        assert calibrate(scores, zeros, nothing, target, 0.98, "topk").k == 1


def test_equal_scores_are_selected_together() -> None:
    scores, values = np.full((4, 5), 2.0, np.float32), np.eye(4, 5, dtype=np.float32)
    for target in ("value_recall", "recall", "density"):
        found = calibrate(scores, values, values > 0, target, 0.5)
        assert (found.threshold, found.density, found.value_recall) == (2, 1, 1)


def test_nan_scores_are_selected_and_counted_and_bad_values_refused() -> None:
    scores = np.array([[np.nan, 3.0, 2.0, 1.0]], np.float32)
    values = np.array([[6.0, 2.0, 1.0, 1.0]], np.float32)
    found = calibrate(scores, values, values > 0, "value_recall", 0.6)
    assert found.threshold == np.nextafter(np.float32(3), np.float32(4)) and found.density == 0.25
    assert calibrate(scores, values, values > 0, "value_recall", 0.7).threshold == 3
    assert calibrate(scores, values, values > 0, "density", 0.5).threshold == 3
    assert calibrate(np.full((1, 2), np.nan, np.float32), values[:, :2], values[:, :2] > 0).density == 1
    with pytest.raises(NumericError, match="nan"):
        calibrate(scores, np.full_like(values, np.nan), values > 0)


@pytest.mark.parametrize("target,goal,selection", [("ppl", 0.9, "topk"), ("recall", 0.0, "topk"),
                                                   ("recall", 1.1, "topk"), ("recall", 0.9, "best")])  # fmt: skip
def test_a_calibration_that_cannot_be_is_refused(target: str, goal: float, selection: str) -> None:
    sample = Sample(2, 3)
    with pytest.raises(UsageError, match="calibration"):
        calibrate(sample.scores, sample.values, sample.active, target, goal, selection)
    with pytest.raises(UsageError, match="0 tokens"):
        calibrate(sample.scores[:0], sample.values[:0], sample.active[:0])


def test_of_many_tokens_some_are_looked_at_and_all_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(1000, 80)
    exact = calibrate(sample.scores, sample.values, sample.active)
    monkeypatch.setattr("converter.predictors.thresholds.SAMPLE", 400 * 80)
    found = calibrate(sample.scores, sample.values, sample.active)
    assert found.threshold != exact.threshold
    assert found.threshold == pytest.approx(exact.threshold, abs=0.1)
    assert found == measure(sample.scores, sample.values, sample.active, "threshold", found.threshold)


def test_bisection_finds_the_least_setting_that_meets_the_limit() -> None:
    asked: list[float] = []

    def ratio(recall: float) -> float:
        asked.append(recall)
        return 1 + (1 - recall)

    found, reached = bisect_target(ratio, 1.01, 0.5, 1.0, 1e-4)
    assert 0.99 <= found < 0.9901 and reached == 1 + (1 - found) <= 1.01
    assert len(asked) <= 15
    assert bisect_target(ratio, 2.0, 0.5, 1.0) == (0.5, 1.5)
    for limit in (0.9, float("nan")):
        with pytest.raises(ConvertError, match="strictest"):
            bisect_target(ratio, limit, 0.5, 1.0)


# Sizes.


def test_the_cheapest_predictor_that_reaches_the_goal_is_chosen() -> None:
    layer_bytes = 1_000_000
    candidates = [
        Candidate(1, None, 10_000, 0.15, 0.98),  # 10,000 + 375,000
        Candidate(2, None, 20_000, 0.08, 0.98),  # 20,000 + 200,000
        Candidate(4, None, 40_000, 0.075, 0.98),  # 40,000 + 187,500
        Candidate(3, None, 30_000, 0.01, 0.97),
    ]
    assert cost(candidates[1], layer_bytes) == 220_000
    assert choose(candidates, layer_bytes, 0.98) is candidates[1]
    assert choose(candidates, layer_bytes, 0.97) is candidates[3]
    assert choose(candidates, layer_bytes, 0.98, working_set=10).bits == 4
    assert choose(candidates[:1], layer_bytes, 0.98, working_set=8) is EVERY
    assert choose(candidates[:1], layer_bytes, 0.98, working_set=8, every=False).bits == 1
    dense = Candidate(None, 256, 50_000, 0.6, 0.98)
    assert cost(dense, layer_bytes) == 1_050_000  # no more than the layer is kept
    assert choose([dense], layer_bytes, 0.98).every
    assert choose([], layer_bytes, 0.98).every
    with pytest.raises(ConvertError, match=r"0.9700 of the target"):
        choose(candidates[3:], layer_bytes, 0.98, every=False)


def test_bytes_are_those_of_the_tensors(layer: Layer) -> None:
    for bits, bias in ((1, None), (3, layer.bias)):
        gate = fit_gate_copy(layer.gate, bias, bits, 32).tensors()
        both = fit_gate_up_copy(layer.gate, bias, layer.up, layer.down, bits, 32).tensors()
        vectors = int(bias is not None)
        assert copy_bytes(WIDTH, D, bits, 32, 1, vectors) == sum(values.nbytes for values in gate.values())
        assert copy_bytes(WIDTH, D, bits, 32, 2, vectors + 1) == sum(values.nbytes for values in both.values())
    for bias in (None, layer.bias):
        tensors = truncated_svd(layer.gate, 5, bias).tensors()
        assert low_rank_bytes(WIDTH, D, 5, bias is not None) == sum(values.nbytes for values in tensors.values())
