"""Log-likelihood arithmetic: what is scored after what, on a tokenizer of one byte per token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsparse.errors import NumericError, UsageError
from flashsparse.likelihood import BLOCK_FLOATS, cut, encode_pair, log_softmax, rolling, score, truncated

BOS = 256


def encode(text: str, special: bool) -> list[int]:
    """Bytes; " a" is one token 1000, as words are in real tokenizers. No BOS, even for a beginning."""
    ids = [int(one) for one in text.encode()]
    out: list[int] = []
    for one in ids:
        if one == ord("a") and out[-1:] == [ord(" ")]:
            out[-1] = 1000
        else:
            out.append(one)
    return out


def encode_with_bos(text: str, special: bool) -> list[int]:
    return [BOS] * special + encode(text, special)


def test_spaces_belong_to_the_continuation() -> None:
    assert encode_pair(encode, "b ", "a", None) == ([98], [1000])
    assert encode_pair(encode, "b", " a", None) == ([98], [1000])
    assert encode_pair(encode, "b  ", "c", None) == ([98], [32, 32, 99])
    assert encode_pair(encode_with_bos, "b ", "a", BOS) == ([BOS, 98], [1000])


def test_an_empty_context_is_the_prefix() -> None:
    assert encode_pair(encode, "", "ba", BOS) == ([BOS], [98, 97])
    assert encode_pair(encode_with_bos, "", "ba", BOS) == ([BOS], [98, 97])
    assert encode_pair(encode, "  ", "b", BOS) == ([BOS], [32, 32, 98])
    # The prefix is not scored after itself.
    assert encode_pair(encode, "", "ba", 98) == ([98], [97])


@pytest.mark.parametrize(("context", "continuation", "prefix"), [("b", "", BOS), ("", "", BOS), ("", "b", None)])
def test_nothing_to_score(context: str, continuation: str, prefix: int | None) -> None:
    with pytest.raises(UsageError, match="cannot score"):
        encode_pair(encode, context, continuation, prefix)


def test_contexts_are_cut_on_the_left() -> None:
    assert truncated([1, 2, 3], [4, 5], 10) == [1, 2, 3, 4]
    assert truncated([1, 2, 3], [4, 5], 4) == [1, 2, 3, 4]
    assert truncated([1, 2, 3], [4, 5], 3) == [2, 3, 4]
    assert truncated([1, 2, 3], [4, 5], 2) == [3, 4]
    with pytest.raises(UsageError, match="2 tokens to score, but the KV cache holds 1"):
        truncated([1, 2, 3], [4, 5], 1)


def test_rolling_windows_as_documented_by_the_harness() -> None:
    assert list(rolling(range(10), BOS, 4)) == [
        ([BOS], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert list(rolling([7], BOS, 4)) == [([BOS], [7])]
    assert list(rolling([], BOS, 4)) == []


@given(st.integers(0, 40), st.integers(1, 12))
def test_rolling_windows_score_each_token_once_with_full_context(count: int, limit: int) -> None:
    ids = list(range(count))
    pairs = list(rolling(ids, BOS, limit))
    assert [token for _, scored in pairs for token in scored] == ids
    whole = [BOS, *ids]
    for context, scored in pairs:
        fed = truncated(context, scored, limit)
        assert fed == [*context, *scored][:-1] and len(fed) <= limit
        at = whole.index(context[0])
        assert whole[at : at + len(fed) + 1] == [*context, *scored]
        assert len(fed) == min(limit, at + len(fed))


def test_scores_by_hand() -> None:
    logits = np.log(np.array([[1, 2, 1], [6, 1, 1]], np.float32))
    total, greedy = score(logits, [1, 0])
    assert greedy and total == pytest.approx(math.log(2 / 4) + math.log(6 / 8), abs=1e-6)
    total, greedy = score(logits, [0, 0])
    assert not greedy and total == pytest.approx(math.log(1 / 4) + math.log(6 / 8), abs=1e-6)


def test_scores_of_many_rows_and_large_logits() -> None:
    rng = np.random.default_rng(0)
    vocabulary = BLOCK_FLOATS // 3  # three rows a block
    logits = (rng.standard_normal((7, vocabulary)) * 50 + 300).astype(np.float32)
    targets = logits.argmax(-1)
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    expected = -np.log(np.exp(wide - top[:, None]).sum(-1)).sum()
    assert score(logits, targets) == (pytest.approx(expected, rel=1e-12), True)
    targets[6] += 1 if targets[6] == 0 else -1
    assert score(logits, targets)[1] is False


def test_numbers_that_are_not_finite() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(NumericError):
            log_softmax(np.array([[0, bad]], np.float32))


def test_stop_sequences() -> None:
    assert cut("one two three", ["three", "two"]) == ("one ", True)
    assert cut("one", ["two", ""]) == ("one", False)
    assert cut("\n\none", ["\n"]) == ("", True)
