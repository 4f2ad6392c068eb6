"""Scoring text that is given: which tokens are scored after which, and what their logits say of them.

Owns the arithmetic of log-likelihoods, of windows over long texts and of stop sequences, on ids and arrays; `feed`
alone needs a session. The rules are those of EleutherAI's lm-evaluation-harness for causal models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.errors import NumericError, UsageError

if TYPE_CHECKING:
    from flashsparse.session import Session

Encode = Callable[[str, bool], list[int]]  # text, whether to add the special tokens of a beginning
BLOCK_FLOATS = 1 << 21  # float64 values alive at once in a softmax


def feed(session: Session, ids: Sequence[int], step: int) -> Iterator[tuple[int, np.ndarray]]:
    """Feed `ids` in steps of `step` tokens: (position of the first, float32 logits [t, V] after each)."""
    for start in range(0, len(ids), step):
        yield start, session.logits(ids[start : start + step])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities [n, V] of float logits [n, V]. Raises NumericError unless all are finite."""
    values = logits.astype(np.float64)
    if not np.isfinite(values).all():
        raise NumericError("the logits are not finite; the pack's weights overflow or are damaged")
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values


def blocks(rows: int, vocabulary: int) -> Iterator[slice]:
    """The rows in blocks whose float64 softmax is small, whatever the vocabulary."""
    size = max(1, BLOCK_FLOATS // vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def score(logits: np.ndarray, targets: Sequence[int]) -> tuple[float, bool]:
    """The log-probability (nats) of `targets` [n] under logits [n, V], and whether greedy decoding chooses them."""
    total, greedy = 0.0, True
    wanted = np.asarray(targets)
    for rows in blocks(len(wanted), logits.shape[1]):
        likely = log_softmax(logits[rows])
        total += float(likely[np.arange(len(likely)), wanted[rows]].sum())
        greedy = greedy and bool((likely.argmax(-1) == wanted[rows]).all())
    return total, greedy


def encode_pair(encode: Encode, context: str, continuation: str, prefix: int | None) -> tuple[list[int], list[int]]:
    """Ids of a context and of the continuation that is scored after it.

    Spaces that end the context belong to the continuation, and the two are encoded as one text: tokens begin with their
    space. An empty context is the token `prefix`. Raises UsageError where there is nothing to score, or nothing before.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        before = encode(stripped, True)
        after = encode(stripped + continuation, True)[len(before) :]
    else:
        before, after = [] if prefix is None else [prefix], encode(continuation, False)
        if after[:1] == before:
            after = after[1:]
    if not before or not after:
        missing = "no token to begin with: the tokenizer has neither a BOS nor an EOS token" if not before else "empty"
        raise UsageError(f"cannot score {continuation[:40]!r} after {context[-40:]!r}: {missing}")
    return before, after


def truncated(context: Sequence[int], continuation: Sequence[int], limit: int) -> list[int]:
    """What is fed to score `continuation`: both less the last token, and from the left what exceeds `limit` tokens.

    The last len(continuation) logits are the continuation's. Raises UsageError when it does not fit by itself.
    """
    if len(continuation) > limit:
        raise UsageError(f"{len(continuation)} tokens to score, but the KV cache holds {limit}; give max_kv_size=")
    return [*context, *continuation][-(limit + 1) :][:-1]


def rolling(ids: Sequence[int], prefix: int, limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that score each of `ids` once, with at most `limit` tokens fed for a pair.

    The first begins with `prefix`; the last has as much context as fits.
    """
    whole = [prefix, *ids]
    for start in range(0, len(ids), limit):
        end = min(start + limit, len(ids))
        yield whole[max(0, end - limit) : start + 1], list(ids[start:end])


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` before the first stop sequence in it, and whether there was one."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)
