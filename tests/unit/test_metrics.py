"""Sparsity metrics against brute force in float64, on cases small enough to check every threshold."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsparse.errors import UsageError
from flashsparse.sparsity import metrics
from flashsparse.sparsity.metrics import Cett
from flashsparse.sparsity.thresholds_file import ModelShape, Thresholds, read_thresholds, write_thresholds


def layer(seed: int, tokens: int = 12, neurons: int = 20, size: int = 6, relu: bool = True) -> tuple[np.ndarray, ...]:
    """(hidden, down, norms) of a random layer."""
    rng = np.random.default_rng(seed)
    gate, up = rng.standard_normal((2, tokens, neurons), np.float32)
    a = np.maximum(gate - np.float32(0.5), 0) if relu else gate / (1 + np.exp(-gate))
    down = rng.standard_normal((size, neurons), np.float32)
    return a * up, down, np.linalg.norm(down, axis=0)


def cett_reference(hidden: np.ndarray, down: np.ndarray, threshold: float) -> float:
    """The definition, token by token and neuron by neuron, in float64."""
    ratios = []
    for h in hidden.astype(np.float64):
        tail, whole = np.zeros(len(down)), np.zeros(len(down))
        for i, value in enumerate(h):
            column = down[:, i].astype(np.float64)
            whole += value * column
            if abs(value) * np.linalg.norm(column) <= threshold:
                tail += value * column
        if np.linalg.norm(whole):
            ratios.append(np.linalg.norm(tail) / np.linalg.norm(whole))
    return float(np.mean(ratios))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_cett_is_the_mean_share_of_the_tails_length(relu: bool, share: float) -> None:
    hidden, down, norms = layer(1, relu=relu)
    values = np.sort(np.unique(np.abs(hidden) * norms))
    index = int(share * (len(values) - 1))
    between = float((values[index] + values[index + 1]) / 2)  # on no value, where rounding would decide
    assert Cett(hidden, down, norms).at(between) == pytest.approx(cett_reference(hidden, down, between), rel=1e-5)


def test_cett_below_the_smallest_is_zero_and_of_everything_is_one() -> None:
    hidden, down, norms = layer(2, relu=False)
    values = np.abs(hidden) * norms
    cett = Cett(hidden, down, norms)
    assert cett.at(float(values.min()) / 2) == 0
    assert cett.at(float(values.max())) == pytest.approx(1, abs=1e-6)


def test_tokens_without_output_are_left_out_of_cett() -> None:
    hidden, down, norms = layer(3)
    silent = np.concatenate([hidden, np.zeros((5, hidden.shape[1]), np.float32)])
    at = float(np.median((np.abs(hidden) * norms)[hidden != 0]))
    assert Cett(silent, down, norms).at(at) == pytest.approx(Cett(hidden, down, norms).at(at), rel=1e-6)
    dead = Cett(np.zeros_like(hidden), down, norms)
    assert dead.at(1.0) == 0
    assert dead.largest_threshold(0.1) == 0


@given(seed=st.integers(0, 50), target=st.floats(0.0, 0.9), relu=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_search_finds_a_candidate_within_the_target_with_the_next_beyond_it(
    seed: int, target: float, relu: bool
) -> None:
    hidden, down, norms = layer(seed, relu=relu)
    cett = Cett(hidden, down, norms)
    found = cett.largest_threshold(target)
    index = int(np.searchsorted(cett.searched.candidates, np.float32(found)))
    if found == 0 and cett.searched.candidates[0] > 0:
        assert cett.at(float(cett.searched.candidates[0])) > target
        return
    assert cett.at(found) <= target
    if index + 1 < len(cett.searched.candidates):
        assert cett.at(float(cett.searched.candidates[index + 1])) > target


@pytest.mark.parametrize("seed", range(6))
def test_the_search_agrees_with_every_value_tried_where_cett_rises(seed: int) -> None:
    """One token whose neurons write to axes of their own: CETT is monotone, so the largest value within is unique."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((1, 30)).astype(np.float32)
    down = np.diag(rng.uniform(0.5, 2, 30)).astype(np.float32)
    norms = np.linalg.norm(down, axis=0)
    values = np.sort((np.abs(hidden) * norms).reshape(-1))
    target = 0.4
    within = [v for v in values if cett_reference(hidden, down, float(v) * 1.000001) <= target]
    threshold = Cett(hidden, down, norms).largest_threshold(target)
    skipped = values < np.float32(threshold)
    assert skipped.sum() == len(within)


def test_nothing_is_skipped_when_the_smallest_candidate_is_beyond_the_target() -> None:
    hidden, down = np.full((4, 3), 2, np.float32), np.eye(3, dtype=np.float32)
    cett = Cett(hidden, down, np.ones(3, np.float32))
    assert cett.largest_threshold(0.5) == 0  # every neuron is as large: below the smallest, or all
    assert metrics.active(hidden, 0.0).all()


def test_the_search_looks_behind_a_bump() -> None:
    """The second neuron cancels the first: CETT is high with the smaller alone and low with both."""
    hidden = np.array([[1.0, 1.001, 5.0]], np.float32)
    down = np.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    cett = Cett(hidden, down, np.ones(3, np.float32))
    cett.searched.candidates = np.array([0.5, 1.0, 1.0005, 1.002, 1.1, 2.0, 6.0], np.float32)
    assert [cett.at(float(t)) < 0.1 for t in cett.searched.candidates] == [True, False, False, True, True, True, False]
    assert cett.largest_threshold(0.1) == 2.0


def test_candidates_run_from_the_smallest_value_to_the_quantile_of_what_is_not_zero() -> None:
    hidden, _, norms = layer(4, tokens=40)
    values = np.abs(hidden) * norms
    candidates = metrics.threshold_candidates(hidden, norms)
    assert len(candidates) == 65536
    assert candidates[0] == 0
    assert candidates[-1] == pytest.approx(np.quantile(values[values > 0], 0.99), rel=1e-5)
    rare = np.zeros((1000, 7), np.float32)  # active in far less than 1 % of the cases
    rare[::500, 3] = 4
    assert metrics.threshold_candidates(rare, np.ones(7, np.float32))[-1] == 4


def test_the_subsample_takes_every_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SUBSAMPLE", 100)
    hidden = np.tile(np.arange(1, 9, dtype=np.float32), (100, 1))  # 8 neurons, stride 8 would see one alone
    assert metrics.threshold_candidates(hidden, np.ones(8, np.float32))[-1] > 7


def test_exact_zeros_are_never_active_and_nan_always_is() -> None:
    values = np.array([0.0, 1e-30, 0.5, np.nan], np.float32)
    assert metrics.active(values, 0.0).tolist() == [False, True, True, True]
    assert metrics.active(values, metrics.fat_threshold(0.0)).tolist() == [False, False, True, True]
    assert metrics.active(values, 0.5).tolist() == [False, False, True, True]  # below, not at


def test_quantities() -> None:
    a, h, c = np.array([[-1, 2]], np.float32), np.array([[3, -4]], np.float32), np.array([2, 0.5], np.float32)
    assert metrics.magnitude("gate", a, h, c).tolist() == [[1, 2]]
    assert metrics.magnitude("hidden", a, h, c).tolist() == [[3, 4]]
    assert metrics.magnitude("value", a, h, c).tolist() == [[6, 2]]


@pytest.mark.parametrize("fraction", [0.0, 0.13, 0.5, 0.999, 1.0])
def test_top_k_skips_the_published_number_of_the_whole_array(fraction: float) -> None:
    a = np.random.default_rng(5).standard_normal((7, 31)).astype(np.float32)
    mask = metrics.top_k_mask(a, fraction)
    skipped = int(a.size * (1 - fraction))
    assert (~mask).sum() == skipped
    if 0 < skipped < a.size:
        assert np.abs(a[~mask]).max() <= np.abs(a[mask]).min()
    threshold = metrics.top_k_threshold(np.sort(np.abs(a), axis=None), fraction)
    assert np.array_equal(metrics.active(np.abs(a), threshold), mask)


def test_top_k_compares_tokens_with_each_other() -> None:
    a = np.array([[1, 2, 3], [10, 20, 30]], np.float32)
    assert metrics.top_k_mask(a, 0.5).tolist() == [[False] * 3, [True] * 3]


def test_cats_is_the_quantile() -> None:
    ascending = np.arange(1, 101, dtype=np.float32)
    for share in (0.0, 0.25, 0.5, 0.9):
        assert (ascending < metrics.cats_threshold(ascending, share)).mean() == share
    assert (ascending < metrics.cats_threshold(ascending, 1.0)).all()


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_teal_skips_the_share_of_a_symmetric_distribution(share: float) -> None:
    h = np.random.default_rng(6).laplace(size=(400, 100)).astype(np.float32)
    threshold = metrics.teal_threshold(h, share)
    assert (np.abs(h) < threshold).mean() == pytest.approx(share, abs=0.015)
    assert threshold == pytest.approx(-np.log(1 - share), rel=0.1)  # the distribution's own inverse
    assert (h[h > 0] < metrics.teal_threshold(h[h > 0], share)).mean() == pytest.approx(share, abs=0.01)  # one-sided


@pytest.mark.parametrize("density", [0.02, 0.015, 0.005])
@pytest.mark.parametrize("signed", [False, True])
def test_teal_skips_only_zeros_of_a_layer_with_next_to_no_active_neurons(density: float, signed: bool) -> None:
    rng = np.random.default_rng(3)
    h = (np.abs(rng.standard_normal(40000)) * (rng.random(40000) < density)).astype(np.float32)
    if signed:
        h *= rng.choice([-1, 1], h.size).astype(np.float32)
    for share in (0.5, 0.9):
        kept = metrics.active(np.abs(h), metrics.teal_threshold(h, share)).mean()
        assert kept == pytest.approx((h != 0).mean(), rel=0.02)


def test_teal_skips_the_share_where_it_ends_among_outliers() -> None:
    h = np.random.default_rng(3).standard_normal(40000).astype(np.float32)
    assert (np.abs(h) < metrics.teal_threshold(h, 0.995)).mean() == pytest.approx(0.995, abs=0.001)


def test_teal_leaves_zeros_alone_where_they_are_more_than_the_share() -> None:
    h = np.zeros((50, 40), np.float32)
    h[:, :4] = np.random.default_rng(7).standard_normal((50, 4))
    assert metrics.active(np.abs(h), metrics.teal_threshold(h, 0.5)).mean() > 0.095


def test_inverse_cdf_is_linear_inside_a_bin() -> None:
    counts, edges = np.array([1, 0, 3]), np.array([0.0, 1.0, 2.0, 5.0])
    assert [metrics.inverse_cdf(counts, edges, q) for q in (0, 0.125, 0.5, 1)] == [0, 0.5, 3, 5]


def test_dead_neurons_fire_in_less_than_a_thousandth() -> None:
    assert metrics.dead_neurons(np.array([0, 1, 2, 3]), 2000) == 2


THRESHOLDS = Thresholds(
    "value", "pplp", 1.0, ModelShape("llama", 64, 96, 2, "silu"), (0.25, 0.0), (0.5, 1.0), 1.0099, ("ab" * 32,), 512
)


def test_thresholds_that_cannot_be_written_name_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="full") as caught:
        write_thresholds(tmp_path / "thresholds.json", THRESHOLDS)
    assert caught.value.filename == str(tmp_path / "thresholds.json")


def test_a_thresholds_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.json"
    thirds = replace(THRESHOLDS, thresholds=(float(np.float32(1 / 3)), 0.0))
    write_thresholds(path, thirds)
    assert read_thresholds(path) == thirds
    assert json.loads(path.read_text())["format"] == "flashsparse-thresholds"
    assert [file.name for file in tmp_path.iterdir()] == ["thresholds.json"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"metric": "guess"}, "metric"),
        ({"quantity": "gate"}, "quantity: found 'gate', expected 'value'"),
        ({"thresholds": [0.5]}, "thresholds.*one per layer"),
        ({"thresholds": [0.5, -1.0]}, r"thresholds\[1\]"),
        ({"thresholds": [0.5, True]}, r"thresholds\[1\]"),
        ({"thresholds": [0.5, 1e999]}, r"thresholds\[1\]"),
        ({"activation_ratio": [0.5, 1.5]}, r"activation_ratio\[1\].*<= 1"),
        ({"ppl_ratio": 0}, "ppl_ratio"),
        ({"tokens": 0}, "tokens"),
        ({"texts": ["x"]}, "texts: found 'x', expected 64 lower-case"),
        ({"texts": "ab" * 32}, "texts.*a list"),
        ({"texts": []}, r"texts: found \[\], expected the SHA-256 digest of at least one text"),
        ({"texts": ["cd" * 32, "ab" * 32]}, "texts.*ascending order"),
        ({"model": {}}, "model"),
        ({"more": 1}, "more: found 1, expected no field of this name"),
    ],
)
def test_a_thresholds_file_is_read_strictly(tmp_path: Path, changed: dict[str, object], words: str) -> None:
    path = tmp_path / "thresholds.json"
    write_thresholds(path, THRESHOLDS)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UsageError, match=words):
        read_thresholds(path)


def test_no_thresholds_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_thresholds(tmp_path / "absent")
    (tmp_path / "text").write_text("no")
    with pytest.raises(UsageError, match="not JSON"):
        read_thresholds(tmp_path / "text")
