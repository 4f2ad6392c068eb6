"""Selection by threshold, by rank, or both: per-token masks and the ascending union, against plain numpy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsparse import native
from flashsparse.kernels.reference import ReferenceKernels

INF, NAN = np.inf, np.nan
REFERENCE = ReferenceKernels(SimpleNamespace(activation=SimpleNamespace(name="relu", param=None)))


def select(scores: np.ndarray, threshold: float, k: int | None = None) -> tuple[np.ndarray, list[int]]:
    """The native selection; the reference kernels must select the same."""
    results = []
    for function in (native.select, REFERENCE.select):
        mask, ids = np.full(scores.shape, 7, np.uint8), np.full(scores.shape[1], -1, np.int32)
        count = function(scores, threshold, k, mask, ids)
        results.append((mask, ids[:count].tolist()))
    assert np.array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    return results[0]


def expected(scores: np.ndarray, threshold: float, k: int | None) -> np.ndarray:
    """One token: sorted by NaN first, then the larger score, then the lower number."""
    order = sorted(range(len(scores)), key=lambda i: (not np.isnan(scores[i]), -scores[i], i))
    mask = np.zeros(len(scores), np.uint8)
    mask[order[:k]] = 1
    return mask & ~(scores < threshold)


def row(*scores: float) -> np.ndarray:
    return np.array([scores], np.float32)


def test_threshold_selects_what_is_not_below_it() -> None:
    scores = np.array([[1, 0.5, NAN, -INF, INF, 0.49], [0, 0.5, 0, 0, 0, 0.6]], np.float32)
    mask, ids = select(scores, 0.5)
    assert mask.tolist() == [[1, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]]
    assert ids == [0, 1, 2, 4, 5]


def test_empty_and_full_selections() -> None:
    scores = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    mask, ids = select(scores, INF)
    assert not mask.any()
    assert ids == []
    mask, ids = select(scores, -INF)
    assert mask.all()
    assert ids == list(range(100))
    assert select(scores, -INF, 100)[0].all()
    assert select(scores, -INF, 1000)[0].all()
    assert not select(scores, INF, 5)[0].any()
    assert select(np.empty((0, 4), np.float32), 0.0, 2)[1] == []
    assert select(np.empty((2, 0), np.float32), 0.0, 2)[1] == []


def test_ties_go_to_the_lower_neuron() -> None:
    assert select(row(1, 2, 2, 2, 3), -INF, 3)[1] == [1, 2, 4]
    assert select(row(5, 5, 5, 5), -INF, 2)[1] == [0, 1]
    assert select(row(-0.0, 0.0, -0.0, -1), -INF, 2)[1] == [0, 1]  # zeros are equal whatever their sign
    assert select(row(0.0, -0.0, 1e-45, -1e-45), -INF, 2)[1] == [0, 2]


def test_nan_is_the_largest() -> None:
    assert select(row(INF, NAN, 3, -NAN, 2), -INF, 2)[1] == [1, 3]
    assert select(row(INF, NAN, 3, -NAN, 2), 2.5, 4)[1] == [0, 1, 2, 3]
    assert select(row(-INF, NAN, -INF), -INF, 2)[1] == [0, 1]


def test_both_limits_hold() -> None:
    scores = np.array([[5, 4, 3, 2, 1], [1, 1, 9, 1, 1]], np.float32)
    mask, ids = select(scores, 3.0, 2)
    assert mask.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert ids == [0, 1, 2]


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 2.0, NAN, INF, -INF, 1e-45]) | st.floats(width=32), min_size=1, max_size=40
    ),
    threshold=st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -INF, INF]),
    k=st.none() | st.integers(1, 45),
)
def test_equals_sorting(scores: list[float], threshold: float, k: int | None) -> None:
    values = np.array([scores, scores[::-1]], np.float32)
    mask, ids = select(values, threshold, k)
    wanted = np.stack([expected(token, threshold, k) for token in values])
    assert np.array_equal(mask, wanted)
    assert ids == np.flatnonzero(wanted.any(axis=0)).tolist()


@pytest.mark.parametrize("k", [1, 500, 1100])
def test_many_neurons_keep_exactly_k(k: int) -> None:
    scores = np.random.default_rng(1).integers(-50, 50, (4, 1152)).astype(np.float32)  # many ties
    mask, _ = select(scores, -INF, k)
    assert mask.sum(axis=1).tolist() == [k] * 4
    for token, chosen in zip(scores, mask, strict=True):
        assert token[chosen == 1].min() >= token[chosen == 0].max()


def test_wrong_operands_are_refused() -> None:
    scores, mask, ids = np.zeros((2, 5), np.float32), np.zeros((2, 5), np.uint8), np.zeros(5, np.int32)
    with pytest.raises(ValueError, match="k 0"):
        native.select(scores, 0.0, 0, mask, ids)
    with pytest.raises(ValueError, match="mask: expected"):
        native.select(scores, 0.0, None, mask[:, :4], ids)
    with pytest.raises(ValueError, match="mask: expected"):
        native.select(scores, 0.0, None, mask.astype(bool), ids)
    with pytest.raises(ValueError, match="ids: expected"):
        native.select(scores, 0.0, 3, mask, ids[:4])
    with pytest.raises(ValueError, match=r"expected \[T, I\]"):
        native.select(scores[0], 0.0, None, mask[0], ids)
