"""Runs a pack over text, window by window, beside the dense model: teacher-forced, and generating freely.

Owns the order of passes. At most the dense logits [T, V] of one window are held, outside the engine's budget. Sums are
measures.py's, the file that keeps them record.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.errors import UsageError
from flashsparse.likelihood import feed, log_softmax
from flashsparse.quality.measures import GenerationMeasures, SetMeasures, TokenMeasures, total

if TYPE_CHECKING:
    from flashsparse.engine import Engine
    from flashsparse.sparsity.judgement import LayerJudgement

PROMPT_TOKENS = 32
SEED = 20240914  # of sampled continuations, plus the prompt's number

Reference = Callable[[int, slice], np.ndarray]  # (window, rows) -> the dense logits [t, V] after those of its tokens
Progress = Callable[[str, int, int], None]  # (what, done, of all)

# What holds where every neuron is computed; how many of them fire is not known there.
_EVERY = {"recall": 1.0, "precision": None, "value_recall": 1.0, "predicted_density": 1.0, "true_density": None}


@dataclass
class Quality:
    """What was measured. `sets` has one entry per layer, none where every neuron is computed by construction.

    `ffn_bytes` is the weight of all records; `generation` is None where nothing was generated.
    """

    tokens: TokenMeasures
    sets: list[SetMeasures]
    utf8_bytes: int | None
    ffn_bytes: int
    generation: GenerationMeasures | None = None

    def to_dict(self) -> dict[str, Any]:
        """The totals, and the same shares of each layer under `layers`.

        `selected_bytes_per_token` is what one token's sets weigh on flash, before the cache saves any of it.
        """
        shares: dict[str, Any] = total(self.sets).to_dict() if self.sets else dict(_EVERY)
        return {
            **self.tokens.to_dict(self.utf8_bytes),
            **shares,
            "selected_bytes_per_token": round(shares["predicted_density"] * self.ffn_bytes),
            "ffn_bytes": self.ffn_bytes,
            "layers": [layer.to_dict() for layer in self.sets],
            "generation": None if self.generation is None else self.generation.to_dict(),
        }

    @property
    def flash_bytes_per_token(self) -> float | None:
        """Bytes that generating read per token, prompts included: with this machine's budget and cache."""
        cost = None if self.generation is None else self.generation.cost
        return cost.flash_bytes / cost.tokens if cost is not None and cost.tokens else None


def cut_windows(ids: Sequence[int], window: int) -> list[list[int]]:
    """Windows of `window` tokens and the one that follows, so that each token but the first is predicted once."""
    return [list(ids[start : start + window + 1]) for start in range(0, len(ids) - 1, window)]


def encode(engine: Engine, text: str, tokens: int) -> list[int]:
    """Token ids of the text, without special tokens; at most `tokens` of them are predicted.

    Raises UsageError when there are fewer than two.
    """
    if engine.tokenizer is None:
        raise UsageError("this pack has no tokenizer, so that no text can be judged; convert it with one")
    # verbose is off because the text may be longer than the context: it is cut into windows.
    ids = [int(token) for token in engine.tokenizer.encode(text, add_special_tokens=False, verbose=False)]
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens, expected at least 2: the first predicts the second")
    return ids[: tokens + 1]


def evaluate(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    reference: Reference | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Quality:
    """Teacher-forced measures over windows, each a new conversation whose every token but the first is predicted.

    The dense side is `reference`, or the same pack computing every neuron when it is one that predicts; a pack that
    is exact by construction is compared with nothing else. Raises NumericError, ContextLengthError, FlashReadError.
    """
    m = engine.manifest
    measures, sets = TokenMeasures(), [SetMeasures() for _ in range(0 if m.tier == "dense" else m.layers)]
    all_tokens = sum(len(window) - 1 for window in windows)
    for index, window in enumerate(windows):
        progress("teacher-forced", measures.tokens, all_tokens)
        dense = None if reference is not None or m.tier != "predict" else _dense_logits(engine, window)
        with judged(engine, sets), engine.session() as session:
            for start, logits in feed(session, window[:-1], m.prefill_chunk):
                rows = slice(start, start + len(logits))
                beside = reference(index, rows) if reference is not None else None if dense is None else dense[rows]
                measures.add(logits, window[start + 1 : rows.stop + 1], beside)
    progress("teacher-forced", all_tokens, all_tokens)
    weight = m.record.bytes * m.intermediate_size * m.layers
    return Quality(measures, sets, spelled_bytes(engine, windows), weight)


@contextmanager
def judged(engine: Engine, sets: list[SetMeasures]) -> Iterator[None]:
    """Count every step's sets into `sets`, one per layer, meanwhile; nothing when there is none."""
    if not sets:
        yield
        return

    def count(judgement: LayerJudgement) -> None:
        sets[judgement.layer].add(judgement.predicted, judgement.active, judgement.values)

    engine.judge(count)
    try:
        yield
    finally:
        engine.judge(None)


@contextmanager
def computing_all(engine: Engine) -> Iterator[None]:
    """The pack as the dense model, meanwhile."""
    engine.set_dense(True)
    try:
        yield
    finally:
        engine.set_dense(False)


def _dense_logits(engine: Engine, window: Sequence[int]) -> np.ndarray:
    """float32 [T, V] of a window's tokens but the last, every neuron computed."""
    out = np.empty((len(window) - 1, engine.manifest.vocab_size), np.float32)
    with computing_all(engine), engine.session() as session:
        for start, logits in feed(session, window[:-1], engine.manifest.prefill_chunk):
            out[start : start + len(logits)] = logits
    return out


def spelled_bytes(engine: Engine, windows: Sequence[Sequence[int]]) -> int | None:
    """UTF-8 bytes of the text that the predicted tokens spell: all but the first one's."""
    ids = [windows[0][0], *(token for window in windows for token in window[1:])]
    decode = engine.tokenizer.decode
    spelled = len(decode(ids).encode()) - len(decode(ids[:1]).encode())
    return spelled if spelled > 0 else None  # less when the first token is a part of a character, shown as U+FFFD


def generate(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    prompts: int,
    length: int,
    progress: Progress = lambda what, done, total: None,
) -> GenerationMeasures | None:
    """Continues `prompts` beginnings of windows by `length` tokens, as the pack selects and with every neuron.

    Greedy continuations are compared token by token. Sampled ones (temperature 1, seeded) are scored by the dense
    model: teacher-forced figures cannot show drift, samples that the dense model finds unlikely do. None when no window
    is as long as a prompt.
    """
    long = [list(window[:PROMPT_TOKENS]) for window in windows if len(window) > PROMPT_TOKENS]
    chosen = [long[i] for i in np.unique(np.linspace(0, len(long) - 1, prompts).astype(int))] if long else []
    measures = GenerationMeasures()
    for index, prompt in enumerate(chosen):
        progress("generating", index, len(chosen))
        seed = SEED + index
        before = engine.counters.copy()
        found, sampled = _continue(engine, prompt, length), _continue(engine, prompt, length, seed)
        measures.cost += engine.counters - before
        with computing_all(engine):
            dense, own = _continue(engine, prompt, length), _continue(engine, prompt, length, seed)
            _score(engine, prompt, sampled, measures.sampled)
            _score(engine, prompt, own, measures.dense_sampled)
        measures.add_greedy(found, dense)
    progress("generating", len(chosen), len(chosen))
    return measures if chosen else None


def _continue(engine: Engine, prompt: list[int], length: int, seed: int | None = None) -> list[int]:
    """`length` tokens after the prompt: greedy, or sampled with a seed. End tokens do not end it: all are compared."""
    rng = None if seed is None else np.random.default_rng(seed)
    tokens: list[int] = []
    with engine.session() as session:
        *_, (_, logits) = feed(session, prompt, engine.manifest.prefill_chunk)
        while True:
            tokens.append(_choose(logits[-1:], rng))
            if len(tokens) == length:
                return tokens
            logits = session.logits(tokens[-1:])


def _choose(logits: np.ndarray, rng: np.random.Generator | None) -> int:
    """The likeliest token under logits [1, V], or one drawn from them: adding Gumbel noise makes the maximum a draw.

    The noise of two models with one seed is the same, so that equal models draw equal samples.
    """
    likely = log_softmax(logits)[0]
    return int(np.argmax(likely if rng is None else likely + rng.gumbel(size=likely.shape)))


def _score(engine: Engine, prompt: list[int], continuation: list[int], measures: TokenMeasures) -> None:
    """Count the losses of `continuation` after `prompt`."""
    inputs, first = [*prompt, *continuation][:-1], len(prompt) - 1
    with engine.session() as session:
        for start, logits in feed(session, inputs, engine.manifest.prefill_chunk):
            skipped = max(0, first - start)
            if skipped < len(logits):
                begin = start + skipped - first
                measures.add(logits[skipped:], continuation[begin : begin + len(logits) - skipped])
