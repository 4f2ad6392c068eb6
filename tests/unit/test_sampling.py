"""Choosing tokens: ranges of the options, samplers that repeat, and a random state that survives mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flashsparse.arguments import integer, token_ids, whole
from flashsparse.errors import NumericError, UsageError
from flashsparse.memory import parse_size
from flashsparse.sampling import MAX_SEED, Sampler, check_sampling

VOCABULARY = 100
LOGITS = np.random.default_rng(0).standard_normal((1, VOCABULARY)).astype(np.float32)


def draw(count: int = 8, temp: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = 1) -> list[int]:
    sample = Sampler(temp, top_p, top_k, seed, VOCABULARY)
    return [sample(LOGITS) for _ in range(count)]


@pytest.mark.parametrize(
    "name,value",
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True),
        ("temp", -1), ("temp", float("nan")), ("temp", float("inf")), ("temp", "warm"), ("temp", True),
        ("top_p", 0), ("top_p", 1.1), ("top_p", float("nan")), ("top_p", None),
        ("top_k", -1), ("top_k", 2.0),
        ("seed", -1), ("seed", 2**63), ("seed", "x"), ("seed", 1.0), ("seed", True),
    ],
)  # fmt: skip
def test_an_option_out_of_its_range_is_named(name: str, value: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 1, "temp": 0.0, "top_p": 1.0, "top_k": 0, "seed": None}
    check_sampling(**options)
    with pytest.raises(UsageError, match=name):
        check_sampling(**{**options, name: value})


def test_a_seed_repeats_whatever_is_drawn_between() -> None:
    first, other = Sampler(1.0, 0.9, 20, 1, VOCABULARY), Sampler(1.0, 1.0, 0, 2, VOCABULARY)
    found = []
    for _ in range(8):
        found.append(first(LOGITS))
        other(LOGITS)
    assert found == draw(top_p=0.9, top_k=20) != draw(top_p=0.9, top_k=20, seed=2)
    assert len(draw(seed=MAX_SEED)) == len(draw(seed=None)) == 8


def test_extreme_options_stand_for_their_limits() -> None:
    likeliest = int(LOGITS.argmax())
    for options in ({"temp": 0.0}, {"temp": 1e-45}, {"temp": 9e-7}, {"temp": 1e-6}, {"top_k": 1}, {"top_p": 1e-46}):
        assert draw(**options) == [likeliest] * 8, options
    assert draw(top_k=VOCABULARY) == draw(top_k=10**30) == draw()
    assert len(set(draw(temp=1e300, count=20))) > 1


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    sample = Sampler(1.0, 1.0, 0, 3, 3)
    counts = np.bincount([sample(logits) for _ in range(2000)], minlength=3)
    assert np.abs(counts / 2000 - [0.5, 0.3, 0.2]).max() < 0.05


@pytest.mark.parametrize("temp", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(temp: float, value: float) -> None:
    logits = LOGITS.copy()
    logits[0, 7] = value
    with pytest.raises(NumericError, match=r"overflow.*damaged"):
        Sampler(temp, 1.0, 0, 1, VOCABULARY)(logits)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_sampler_that_fails_leaves_the_random_state_usable(error: type[BaseException]) -> None:
    import mlx.core as mx

    def traced(key_shape: mx.array) -> mx.array:
        mx.random.uniform(shape=(1,))
        raise error

    expected = draw(top_p=0.9, top_k=20)
    sample = Sampler(1.0, 1.0, 0, 1, VOCABULARY)
    sample._choose = mx.compile(traced, inputs=mx.random.state, outputs=mx.random.state)
    with pytest.raises(error):
        sample(LOGITS)
    assert np.isfinite(np.array(mx.random.uniform(shape=(2,)))).all()
    assert draw(top_p=0.9, top_k=20) == expected


def test_whole_numbers_of_any_integer_type() -> None:
    assert [integer(v) for v in (3, np.int64(3), np.uint8(3))] == [3, 3, 3]
    assert [integer(v) for v in (True, np.True_, 3.0, "3", None)] == [None] * 5
    with pytest.raises(UsageError, match="threads is 2000, expected a whole number, 1 to 1024"):
        whole("threads", 2000, 1, 1024)
    with pytest.raises(UsageError, match="n is a number of type int"):
        whole("n", 10**6000, 1, 2)


@pytest.mark.parametrize("values", ["text", b"hi", [1.9], ["1"], [None], [True], [9], [-1], [10**6000], None, 5])
def test_what_is_no_list_of_token_ids(values: Any) -> None:
    with pytest.raises(UsageError):
        token_ids(values, 9)


def test_token_ids_of_numpy() -> None:
    found = token_ids(np.array([1, 2], np.int32), 9)  # type: ignore[arg-type]
    assert found == [1, 2] and {type(t) for t in found} == {int}


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 400 + ".5", "1." + "0" * 5000, "１２GB", "0.0000001%", "200%"])
def test_sizes_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_size(text, 10**6)
    assert len(str(refused.value)) < 200
