"""Calibration's statistics against hand-made cases and float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter import statistics
from converter.model import LayerWeights
from converter.statistics import Coactivation, LayerStatistics, Moments, Persistence, Similarity, activity_rule
from converter.walk import Block
from flashsparse.pack.manifest import Activation
from flashsparse.sparsity.activations import activate, active, intermediate

LOOKBACKS = statistics.LOOKBACKS


def rows(*sets: str) -> np.ndarray:
    """Active sets of neurons a..h as bool [t, 8]."""
    return np.array([[letter in one for letter in "abcdefgh"] for one in sets])


def test_persistence_by_hand() -> None:
    found = Persistence(8)
    found.update(rows("ab", "bc", "ad"), 0)
    result = found.result()
    # k = 1: token 1 finds b, token 2 finds neither a nor d; k = 2: token 2 finds a of a, d.
    assert result["persistence"][:2].tolist() == [1 / 4, 1 / 2]
    # k = 1: 2 of 8 at each token; k = 2: abc, abcd.
    assert result["union"][:2].tolist() == [2 / 8, (3 + 4) / 2 / 8]
    assert np.isnan(result["persistence"][2:]).all() and np.isnan(result["union"][2:]).all()
    assert result["jaccard"][0] == pytest.approx((1 / 3 + 0) / 2)


def test_persistence_forgets_at_the_start_of_a_window() -> None:
    found = Persistence(8)
    for window in (rows("a", "a"), rows("b", "b")):
        found.update(window, 0)
    assert found.result()["persistence"][0] == 1
    assert found.result()["union"][:2].tolist() == [1 / 8, 1 / 8]
    assert found.result()["jaccard"][0] == 1


def test_persistence_leaves_empty_sets_out() -> None:
    found = Persistence(8)
    found.update(rows("", "", "a", "a"), 0)
    assert found.result()["persistence"][0] == 1 / 2
    assert found.result()["jaccard"][0] == (0 + 1) / 2


def slow_persistence(active_sets: np.ndarray, lookback: int) -> tuple[float, float]:
    hits, total, unions = 0, 0, []
    for token in range(len(active_sets)):
        if token >= lookback:
            recent = active_sets[token - lookback : token].any(axis=0)
            hits, total = hits + (active_sets[token] & recent).sum(), total + active_sets[token].sum()
        if token + 1 >= lookback:
            unions.append(active_sets[token + 1 - lookback : token + 1].any(axis=0).mean())
    return float(hits / total) if total else float("nan"), float(np.mean(unions)) if unions else float("nan")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.floats(0.02, 0.9), st.integers(0, 2**32 - 1))
def test_persistence_against_its_definition(tokens: int, neurons: int, density: float, seed: int) -> None:
    sets = np.random.default_rng(seed).random((tokens, neurons)) < density
    found = Persistence(neurons)
    cut = tokens // 3
    found.update(sets[:cut], 0)
    found.update(sets[cut:], cut)
    expected = np.array([slow_persistence(sets, k) for k in LOOKBACKS])
    np.testing.assert_allclose(found.result()["persistence"], expected[:, 0])
    np.testing.assert_allclose(found.result()["union"], expected[:, 1])


def test_coactivation_counts_the_hottest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "HOTTEST", 3)
    sets = rows("abh", "ab", "b", "cb", "h")
    found = Coactivation(8, len(sets))
    found.update(sets[:2])
    found.update(sets[2:])
    result = found.result(sets.mean(axis=0))
    assert result["coactivation_ids"].tolist() == [1, 0, 7]  # b, then a and h with two each
    assert result["coactivation"].tolist() == [[4, 2, 1], [2, 2, 1], [1, 1, 2]]


def test_coactivation_samples_tokens_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLED_TOKENS", 4)
    found = Coactivation(8, 10)  # every third: tokens 0, 3, 6, 9
    for part in np.split(rows("a", "b", "b", "a", "b", "b", "a", "b", "b", "ac"), [1, 2, 6]):
        found.update(part)
    result = found.result(np.arange(8, 0, -1))
    assert result["coactivation"][0, 0] == 4 and result["coactivation"][0, 2] == 1
    assert result["coactivation"][1].sum() == 0


def test_moments_keep_a_small_spread_around_a_large_mean() -> None:
    values = (1000 + np.random.default_rng(0).standard_normal((300, 3)) * [1e-1, 1, 0]).astype(np.float32)
    found = Moments(3)
    for part in np.split(values, [1, 7, 200]):
        found.update(part)
    np.testing.assert_allclose(found.mean, values.mean(axis=0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(found.std, values.std(axis=0, dtype=np.float64), rtol=1e-4)


def test_similarity_is_the_mean_cosine_and_leaves_zeros_out() -> None:
    found = Similarity()
    assert np.isnan(found.mean)
    a = np.array([[1, 0], [1, 1], [0, 0], [2, 0]], np.float32)
    found.update(a, np.array([[0, 3], [1, 0], [1, 0], [5, 0]], np.float32))
    assert found.mean == pytest.approx((0 + 2**-0.5 + 1) / 3)


def layer(rng: np.random.Generator, d: int, neurons: int) -> LayerWeights:
    parts = dict.fromkeys(LayerWeights.__dataclass_fields__)
    parts |= {"up": rng.standard_normal((neurons, d)), "down": rng.standard_normal((d, neurons)).astype(np.float32)}
    return LayerWeights(**parts)  # type: ignore[arg-type]


def walked(statistics: LayerStatistics, activation: Activation, tokens: int = 48) -> tuple[dict, dict]:
    """Two windows of random blocks through a collector: its tensors, and everything it saw as float64."""
    rng, d, neurons = np.random.default_rng(1), 6, 20
    weights = layer(rng, d, neurons)
    statistics.begin(0, weights)
    seen: dict[str, list[np.ndarray]] = {}
    for window, start in ((0, 0), (0, 16), (1, 0)):
        draw = {name: rng.standard_normal((tokens // 3, d)).astype(np.float32) for name in ("before", "middle", "x")}
        gate, up = (rng.standard_normal((tokens // 3, neurons)).astype(np.float32) for _ in range(2))
        hidden = intermediate(activation.name, activation.param, gate, up)
        heads = np.abs(rng.standard_normal((tokens // 3, 2))).astype(np.float32)
        block = Block(0, window, start, draw["before"], draw["middle"], draw["x"], gate, up, hidden, heads)
        ffn, after = (rng.standard_normal((tokens // 3, d)).astype(np.float32) for _ in range(2))
        statistics.visit(block)
        statistics.output(block, ffn, after)
        for name, value in {**draw, "gate": gate, "hidden": hidden, "heads": heads, "ffn": ffn, "after": after}.items():
            seen.setdefault(name, []).append(value.astype(np.float64))
    everything = {name: np.concatenate(values) for name, values in seen.items()}
    return statistics.end(0), everything | {"norms": np.linalg.norm(weights.down.astype(np.float64), axis=0)}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


def test_a_layer_against_float64() -> None:
    relu = Activation("relu")
    found, seen = walked(LayerStatistics(activity_rule(relu), 48, covariance=True), relu)
    values = np.abs(seen["hidden"]) * seen["norms"]
    norms = np.linalg.norm(seen["ffn"], axis=1)
    expected = {
        "frequency": (seen["gate"] > 0).mean(axis=0),
        "value_mean": values.mean(axis=0),
        "value_std": values.std(axis=0),
        "ffn_norm": [norms.mean(), norms.std()],
        "head_norm_mean": seen["heads"].mean(axis=0),
        "head_norm_std": seen["heads"].std(axis=0),
        "similarity": [cosine(seen["before"], seen["after"]), cosine(seen["before"], seen["middle"])],
        "x_mean": seen["x"].mean(axis=0),
        "x_square": (seen["x"] ** 2).mean(axis=0),
        "x_second_moment": seen["x"].T @ seen["x"] / 48,
    }
    for name, value in expected.items():
        assert found[name].dtype == np.float32, name
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert set(found) == {*expected, "persistence", "union", "jaccard", "coactivation", "coactivation_ids"}
    # The second window begins at token 32.
    first, second = (seen["gate"][part] > 0 for part in (slice(0, 32), slice(32, 48)))
    now, recent = np.concatenate([first[1:], second[1:]]), np.concatenate([first[:-1], second[:-1]])
    np.testing.assert_allclose(found["persistence"][0], (now & recent).sum() / now.sum(), rtol=1e-6)


def test_silu_has_no_active_sets_without_a_threshold() -> None:
    silu = Activation("silu")
    assert activity_rule(silu) is None
    found, _ = walked(LayerStatistics(None, 48), silu)
    assert not {"frequency", "persistence", "union", "jaccard", "coactivation", "x_second_moment"} & set(found)
    found, seen = walked(LayerStatistics(activity_rule(silu, 0.2), 48), silu)
    g = seen["gate"]
    np.testing.assert_allclose(found["frequency"], (np.abs(g / (1 + np.exp(-g))) > 0.2).mean(axis=0), atol=1e-6)


def test_activations() -> None:
    g = np.array([-100, -1, 0, 0.005, 2, 100], np.float32)
    assert activate("relu", None, g).tolist() == activate("drelu", None, g).tolist() == [0, 0, 0, g[3], 2, 100]
    assert activate("relu2", None, g).tolist() == [0, 0, 0, g[3] * g[3], 4, 10000]
    assert activate("fatrelu", 0.01, g).tolist() == [0, 0, 0, 0, 2, 100]
    assert activate("fatrelu", 2.0, g).tolist() == [0, 0, 0, 0, 2, 100]
    expected = g.astype(np.float64) / (1 + np.exp(-g.astype(np.float64)))
    np.testing.assert_allclose(activate("silu", None, g), expected, rtol=1e-6, atol=1e-30)
    with np.errstate(over="raise", invalid="raise"):
        assert activate("silu", None, np.array([-3e38, 3e38], np.float32)).tolist() == [0, np.float32(3e38)]
    with pytest.raises(ValueError, match="gelu"):
        activate("gelu", None, g)


def test_intermediate_values_and_active_sets() -> None:
    g, up = np.array([[1, 2, -1]], np.float32), np.array([[-3, 3, 3]], np.float32)
    assert intermediate("relu", None, g, up).tolist() == [[-3, 6, 0]]
    assert intermediate("drelu", None, g, up).tolist() == [[0, 6, 0]]
    assert intermediate("relu", None, g, None).tolist() == [[1, 2, 0]]
    assert active("drelu", None, g).tolist() == [[True, True, False]]
    assert active("fatrelu", 1.5, g).tolist() == [[False, True, False]]


@pytest.mark.parametrize("name", ["relu", "drelu", "relu2", "fatrelu", "silu"])
def test_numbers_that_are_none_stay_so(name: str) -> None:
    assert np.isnan(activate(name, 0.1, np.array([np.nan], np.float32))).all()
