"""Orders of records: each neuron once, friends together, the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.ordering import coactivation_order, frequency_order, greedy_path, random_order


def sets(tokens: int, neurons: int, density: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((tokens, neurons)) < density


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 6), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_every_order_names_each_neuron_once(tokens: int, neurons: int, density: float, seed: int) -> None:
    active = sets(tokens, neurons, density, seed)
    for order in (coactivation_order(active), frequency_order(active), random_order(neurons, seed, 0)):
        assert order.dtype == np.int32 and sorted(order.tolist()) == list(range(neurons))


def naive_path(active: np.ndarray) -> list[int]:
    """Ripple's greedy search over all pairs, chains as lists."""
    neurons = active.shape[1]
    together = active.astype(int).T @ active.astype(int)
    pairs = [(-together[a, b], a, b) for a in range(neurons) for b in range(a + 1, neurons) if together[a, b]]
    chains = [[n] for n in range(neurons)]
    for _, a, b in sorted(pairs):
        one = next(chain for chain in chains if a in chain)
        two = next(chain for chain in chains if b in chain)
        if one is two or a not in (one[0], one[-1]) or b not in (two[0], two[-1]):
            continue
        chains.remove(two)
        one[:] = (one if one[-1] == a else one[::-1]) + (two if two[0] == b else two[::-1])
    chains = [chain if chain[0] < chain[-1] else chain[::-1] for chain in chains]
    chains.sort(key=lambda chain: (-max(together[n, n] for n in chain), min(chain)))
    return [n for chain in chains for n in chain]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.05, 0.9), st.integers(0, 999))
def test_the_path_is_the_greedy_one(tokens: int, neurons: int, density: float, seed: int) -> None:
    active = sets(tokens, neurons, density, seed)
    assert greedy_path(active).tolist() == naive_path(active)


def test_groups_that_fire_together_lie_together() -> None:
    rng = np.random.default_rng(1)
    group = rng.permutation(np.repeat(np.arange(12), 20))
    active = (rng.random((400, 12)) < 0.1)[:, group]
    order = coactivation_order(active)
    assert np.count_nonzero(np.diff(group[order])) == 11
    assert np.count_nonzero(np.diff(group[random_order(240, 0, 0)])) > 150


def test_hot_neurons_lie_apart() -> None:
    active = sets(200, 30, 0.1)
    active[:, [3, 17]] = sets(200, 2, 0.8, 5)
    assert sorted(coactivation_order(active)[:2].tolist()) == [3, 17]


def test_equals_keep_their_order() -> None:
    active = np.zeros((4, 5), bool)
    active[:, 2] = True
    assert frequency_order(active).tolist() == [2, 0, 1, 3, 4]
    assert coactivation_order(np.zeros((0, 4), bool)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("seed", "layer"), [(1, 0), (0, 1)])
def test_seed_and_layer_change_a_random_order(seed: int, layer: int) -> None:
    assert random_order(50, seed, layer).tolist() != random_order(50, 0, 0).tolist()
    assert random_order(50, seed, layer).tolist() == random_order(50, seed, layer).tolist()
