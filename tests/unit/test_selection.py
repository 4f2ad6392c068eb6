"""Selection rules against a slow one, scores by hand, and the counts of a hand-made confusion matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flashsparse.errors import UsageError
from flashsparse.sparsity.selection import (
    Confusion,
    confusion,
    needed,
    scores_from_gate,
    scores_from_gate_up,
    select,
    value_recall,
)

NAN = float("nan")
GATE = np.array([[-2.0, 0.0, 3.0]], np.float32)
UP = np.array([[1.0, -4.0, -2.0]], np.float32)
NORMS = np.array([1.0, 2.0, 0.5], np.float32)
few = st.sampled_from([-np.inf, -1.0, 0.0, -0.0, 1.0, 2.0, np.inf, NAN])


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=few), st.data())
def test_the_rules_are_those_of_a_stable_sort(scores: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, scores.shape[1]))
    threshold = data.draw(st.sampled_from([-np.inf, 0.0, 0.5, 1.0, np.inf]))
    high = [[i for i, s in enumerate(row) if s >= threshold or s != s] for row in scores]
    best = [
        sorted(range(len(row)), key=lambda i, row=row: (row[i] == row[i], -row[i] if row[i] == row[i] else 0, i))[:k]
        for row in scores
    ]
    expected = {
        "threshold": high,
        "topk": best,
        "topk_and_threshold": [set(a) & set(b) for a, b in zip(high, best, strict=True)],
    }
    for rule, rows in expected.items():
        found = select(scores, rule, threshold, k)
        assert [set(np.flatnonzero(row)) for row in found] == [set(row) for row in rows]


@pytest.mark.parametrize("rule,threshold,k", [("most", 0.0, 1), ("topk", 0.0, None), ("topk", 0.0, 4),
                                              ("threshold", None, 1), ("topk_and_threshold", NAN, 1)])  # fmt: skip
def test_a_rule_without_its_number_is_refused(rule: str, threshold: float | None, k: int | None) -> None:
    with pytest.raises(UsageError, match="selection"):
        select(GATE, rule, threshold, k)


def test_scores_of_the_gate() -> None:
    for name in ("relu", "relu2", "drelu"):
        assert np.array_equal(scores_from_gate(name, None, GATE), GATE)
    silu = np.abs(GATE / (1 + np.exp(-GATE)))
    np.testing.assert_allclose(scores_from_gate("silu", None, GATE), silu, rtol=1e-6)


@pytest.mark.parametrize(
    "name,param,expected",
    [
        ("relu", None, [0, 0, 3]), ("relu2", None, [0, 0, 9]), ("drelu", None, [0, 0, 0]),
        ("fatrelu", 3.5, [0, 0, 0]), ("silu", None, [0.23840584, 0, 2.8577223]),
    ],
)  # fmt: skip
def test_scores_of_gate_and_up_are_values(name: str, param: float | None, expected: list[float]) -> None:
    found = scores_from_gate_up(name, param, GATE, UP, NORMS)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    if name != "drelu":
        without = scores_from_gate_up(name, param, GATE, None, NORMS)
        np.testing.assert_allclose(without[0] * [1, 4, 2], expected, rtol=1e-6)


def test_counts_are_deja_vus() -> None:
    predicted = np.array([[1, 1, 0, 0], [0, 1, 0, 0]], bool)
    active = np.array([[1, 0, 1, 1], [0, 1, 0, 0]], bool)
    counts = confusion(predicted, active)
    assert counts == Confusion(hits=2, active=4, predicted=3, pairs=8)
    # mean hits 1, mean active 2, mean predicted 1.5: not the mean of 1/3 and 1
    assert (counts.recall, counts.precision, counts.density, counts.true_density) == (0.5, 2 / 3, 3 / 8, 0.5)
    assert sum((confusion(p[None], a[None]) for p, a in zip(predicted, active, strict=True)), Confusion()) == counts


def test_counts_of_nothing() -> None:
    assert (Confusion().recall, Confusion().precision, Confusion().density, Confusion().true_density) == (1, 1, 0, 0)


def test_value_recall_is_a_share_of_the_sum() -> None:
    values = np.array([[1.0, 0, 5], [2, 0, 0]])
    assert value_recall(np.array([[0, 1, 1], [0, 0, 0]], bool), values) == 5 / 8
    assert value_recall(np.zeros((2, 3), bool), np.zeros((2, 3))) == 1


def test_neurons_of_little_effect_are_not_needed() -> None:
    hidden = np.array([[0.0, -1.0, 0.1, NAN]], np.float32)
    norms = np.array([9.0, 2.0, 1.0, 1.0], np.float32)
    assert needed(hidden, norms).tolist() == [[False, True, True, True]]
    assert needed(hidden, norms, 0.5).tolist() == [[False, True, False, True]]
    assert needed(hidden, norms, 2.0).tolist() == [[False, True, False, True]]  # inactive iff below, not equal
