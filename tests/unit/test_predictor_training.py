"""Training of a predictor: gradients, loss and steps by hand, then whole trainings of a random layer."""

from __future__ import annotations

import numpy as np
import pytest

from converter.predictors.low_rank import rectified, truncated_svd, whitened_svd
from converter.predictors.train import AdamW, Settings, gradients, labels, loss, negative_weight, split, train
from flashsparse.errors import NumericError, UsageError
from tests.unit.random_layer import WIDTH, D, Layer, numbers


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer()


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
    assert not labels("value", activation * 0, hidden * 0, norms).any()  # a dead layer
    for kind, share in (("most", None), ("value", 0.0), ("clip", 1.5)):
        with pytest.raises(UsageError, match="label"):
            labels(kind, activation, hidden, norms, share)
    with pytest.raises(UsageError, match='try "value"'):
        labels("active", activation + 5, hidden, norms)
