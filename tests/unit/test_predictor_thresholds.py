"""Thresholds, k and sizes: on random samples against their definitions, the edge cases by hand."""

from __future__ import annotations

import numpy as np
import pytest

from converter.predictors.copies import fit_gate_copy, fit_gate_up_copy
from converter.predictors.low_rank import truncated_svd
from converter.predictors.sizing import EVERY, Candidate, choose, copy_bytes, cost, low_rank_bytes
from converter.predictors.thresholds import bisect_target, calibrate, measure
from flashsparse.errors import ConvertError, NumericError, UsageError
from flashsparse.sparsity.selection import top
from tests.unit.random_layer import WIDTH, D, Layer


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


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


def test_k_for_a_density_is_not_rounded_up_by_the_product_of_floats() -> None:
    scores = np.random.default_rng(0).standard_normal((7, 1000)).astype(np.float32)
    for percent in range(1, 101):
        assert calibrate(scores, np.abs(scores), scores > 0, "density", percent / 100, "topk").k == 10 * percent


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


def test_a_density_leaves_a_mass_of_ties_out_when_that_comes_closer() -> None:
    scores = np.array([[0.0] * 16 + [1.0, 2.0, 3.0, 4.0]], np.float32)  # value scores: most are 0
    values = np.maximum(scores, 0)
    assert calibrate(scores, values, values > 0, "density", 0.3).threshold == 1
    assert calibrate(scores, values, values > 0, "density", 0.8).threshold == 0
    assert calibrate(scores, values, values > 0, "density", 0.15).threshold == 2


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
        both = fit_gate_up_copy(layer.gate, bias, layer.up, None, layer.down[0], bits, 32).tensors()
        vectors = int(bias is not None)
        assert copy_bytes(WIDTH, D, bits, 32, 1, vectors) == sum(values.nbytes for values in gate.values())
        assert copy_bytes(WIDTH, D, bits, 32, 2, vectors + 1) == sum(values.nbytes for values in both.values())
    for bias in (None, layer.bias):
        tensors = truncated_svd(layer.gate, 5, bias).tensors()
        assert low_rank_bytes(WIDTH, D, 5, bias is not None) == sum(values.nbytes for values in tensors.values())
