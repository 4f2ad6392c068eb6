"""The walk: a dense model over many windows of tokens, layer by layer, so that one layer's weights are held at a time.

Owns the order of operations and what a visitor sees of each layer. Weights come from `model`, single operations from
`forward`, the tokens' states between layers live in `states`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converter.forward import attend, linear, rope_frequencies, rotate
from converter.model import LayerWeights, Model
from converter.states import States
from flashsparse.sparsity.activations import intermediate

BLOCK_TOKENS = 256  # tokens whose [t, I] arrays are held at once
LOGITS_TOKENS = 1024  # tokens whose losses are computed at once


@dataclass(eq=False)
class Block:
    """Some consecutive tokens of one window in one layer, t of them from `start` on; everything is float32.

    Residuals [t, d]: `before` enters the layer, `middle` follows attention (and its norm, where the norm comes after).
    `x` [t, d] is the FFN's input after its norm, `gate` [t, I] the pre-activations g with their bias (of fc1 without a
    gate), `up` [t, I] or None, `hidden` [t, I] what the down projection is multiplied with, `head_norms` [t, H] the
    L2 norm of each head's attention output.
    """

    layer: int
    window: int
    start: int
    before: np.ndarray
    middle: np.ndarray
    x: np.ndarray
    gate: np.ndarray
    up: np.ndarray | None
    hidden: np.ndarray
    head_norms: np.ndarray


Visit = Callable[[Block], np.ndarray | None]  # may return bool [t, I]: where it is false, hidden becomes zero
OnLayer = Callable[[int, LayerWeights], None]
OnOutput = Callable[
    [Block, np.ndarray, np.ndarray], None
]  # (block, FFN output [t, d], residual after the layer [t, d])
OnDone = Callable[[int], None]
Progress = Callable[[str, int, int], None]  # (what, tokens times layers done, of all)


def windows_of(ids: Sequence[int] | np.ndarray, length: int) -> list[np.ndarray]:
    """`ids` cut into windows of `length` tokens; a last one of less than two tokens is dropped: it predicts nothing."""
    if length < 2:
        raise ValueError(f"a window of {length} tokens: expected at least 2")
    flat = np.asarray(ids, np.int64)
    return [part for begin in range(0, len(flat), length) if len(part := flat[begin : begin + length]) >= 2]


def walk(
    model: Model,
    windows: Sequence[np.ndarray],
    visit: Visit | None = None,
    *,
    on_layer: OnLayer | None = None,
    on_output: OnOutput | None = None,
    on_done: OnDone | None = None,
    work: Path | None = None,
    resume: bool = False,
    key: str = "",
    progress: Progress | None = None,
) -> States:
    """Runs every window through every layer; the states after the last one.

    Windows are independent: each starts without history. `on_layer` is called with a layer's weights before its first
    block, `visit` for each block, `on_output` after it, and `on_done` when the layer was seen whole, before it counts
    as done: save what a visitor collected there. `work` keeps the states on disk; with `resume`, a walk of the same
    model, windows and `key` that was stopped goes on with the first layer that was not done. Raises UsageError for a
    window longer than the context, CheckpointError for token ids outside the vocabulary, OSError when writing fails.
    """
    steps = _Steps(model, visit, on_output, progress or _silent, sum(map(len, windows)))
    states = States([len(w) for w in windows], model.hidden_size, work, _key(model, windows, key))
    try:
        if not (work is not None and resume and states.resume()):
            for window in windows:
                states.write(model.embed(window))
        for index in range(states.layer, model.layers):
            _layer(steps, model, states, index, on_layer, on_done)
    except BaseException:
        states.close()
        raise
    return states


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _key(model: Model, windows: Sequence[np.ndarray], key: str) -> str:
    activation = model.activation.name, model.activation.param
    digest = hashlib.sha256(f"{model.digest} {activation} {key} {[len(w) for w in windows]}".encode())
    for window in windows:
        digest.update(np.ascontiguousarray(window, "<i8").tobytes())
    return digest.hexdigest()


def _layer(
    steps: _Steps, model: Model, states: States, index: int, on_layer: OnLayer | None, on_done: OnDone | None
) -> None:
    """One layer over all windows. Its weights are gone when this returns."""
    weights = model.layer(index)
    if on_layer is not None:
        on_layer(index, weights)
    last = len(states.lengths) - 1
    for window, before in enumerate(states):
        after = steps.window(index, window, before, weights)
        if window == last and on_done is not None:
            on_done(index)
        states.write(after)


class _Steps:
    """The operations of a layer on one window, with what they need of the model."""

    def __init__(
        self, model: Model, visit: Visit | None, on_output: OnOutput | None, progress: Progress, tokens: int
    ) -> None:
        self.model, self.visit, self.on_output, self.progress = model, visit, on_output, progress
        self.tokens = tokens
        self.norm_first = bool(model.config.get("do_layer_norm_before", True))
        self.scale = np.float32(model.config.get("residual_multiplier", 1.0))
        self.rope = None if model.family == "opt" else rope_frequencies(model.config)
        self._layer, self._done = -1, 0

    def window(self, layer: int, window: int, before: np.ndarray, w: LayerWeights) -> np.ndarray:
        """[T, d] entering the layer -> [T, d] leaving it."""
        middle, head_norms = self._attention(before, w)
        after = np.empty_like(before)
        for begin in range(0, len(before), BLOCK_TOKENS):
            part = slice(begin, min(len(before), begin + BLOCK_TOKENS))
            block = self._block(layer, window, begin, before[part], middle[part], head_norms[part], w)
            after[part] = self._ffn(block, w)
            self._tell(layer, len(block.x))
        return after

    def _tell(self, layer: int, tokens: int) -> None:
        if layer != self._layer:
            self._layer, self._done = layer, layer * self.tokens
        self._done += tokens
        layers = self.model.layers
        self.progress(f"layer {layer + 1} of {layers}", self._done, layers * self.tokens)

    def _attention(self, before: np.ndarray, w: LayerWeights) -> tuple[np.ndarray, np.ndarray]:
        """The residual after attention [T, d] and each head's output norm [T, H]."""
        model, length = self.model, len(before)
        h = model.norm(before, w.attention_norm, w.attention_norm_bias) if self.norm_first else before
        q = linear(h, w.q, w.q_bias).reshape(length, model.heads, model.head_dim)
        k = linear(h, w.k, w.k_bias).reshape(length, model.kv_heads, model.head_dim)
        v = linear(h, w.v, w.v_bias).reshape(length, model.kv_heads, model.head_dim)
        if self.rope is not None:
            q, k = rotate(q, *self.rope), rotate(k, *self.rope)
        seen = attend(q, k, v, w.window)
        middle = before + self.scale * linear(seen.reshape(length, -1), w.o, w.o_bias)
        if not self.norm_first:
            middle = model.norm(middle, w.attention_norm, w.attention_norm_bias)
        return middle, np.sqrt(np.einsum("thd,thd->th", seen, seen))

    def _block(
        self,
        layer: int,
        window: int,
        start: int,
        before: np.ndarray,
        middle: np.ndarray,
        head_norms: np.ndarray,
        w: LayerWeights,
    ) -> Block:
        x = self.model.norm(middle, w.ffn_norm, w.ffn_norm_bias) if self.norm_first else middle
        gate = linear(x, w.scoring, w.scoring_bias)
        up = None if w.gate is None else linear(x, w.up, w.up_bias)
        activation = self.model.activation
        hidden = intermediate(activation.name, activation.param, gate, up)
        return Block(layer, window, start, before, middle, x, gate, up, hidden, head_norms)

    def _ffn(self, block: Block, w: LayerWeights) -> np.ndarray:
        """The residual after the layer [t, d]; the visitor may take neurons out."""
        mask = None if self.visit is None else self.visit(block)
        hidden = block.hidden
        if mask is not None:
            if mask.shape != hidden.shape or mask.dtype != bool:
                raise ValueError(f"a mask of {mask.dtype} {mask.shape}: expected bool {hidden.shape}")
            hidden = np.where(mask, hidden, np.float32(0))
        ffn = linear(hidden, w.down, w.down_bias)
        after = block.middle + self.scale * ffn
        if not self.norm_first:
            after = self.model.norm(after, w.ffn_norm, w.ffn_norm_bias)
        if self.on_output is not None:
            self.on_output(block, ffn, after)
        return after


def losses(model: Model, states: States, windows: Sequence[np.ndarray]) -> np.ndarray:
    """Nats of every predicted token, float64: windows one after the other, T - 1 tokens of each.

    The perplexity is exp of their mean. Holds `LOGITS_TOKENS` states and a part of the head at once.
    """
    parts = [_losses(model, *some) for some in _predictions(states, windows)]
    return np.concatenate(parts) if parts else np.empty(0)


def _predictions(states: States, windows: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """States [n, d] and the tokens [n] they predict, n about LOGITS_TOKENS."""
    rows: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    for state, window in zip(states, windows, strict=True):
        rows.append(state[:-1])
        tokens.append(np.asarray(window[1:], np.int64))
        if sum(map(len, tokens)) >= LOGITS_TOKENS:
            yield np.concatenate(rows), np.concatenate(tokens)
            rows, tokens = [], []
    if tokens:
        yield np.concatenate(rows), np.concatenate(tokens)


def _losses(model: Model, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[token], summed up over the blocks of the head as they come."""
    x = model.final(states)
    largest = np.full(len(x), -np.inf)
    total, chosen = np.zeros(len(x)), np.zeros(len(x))
    for begin, head in model.head():
        for first in range(0, len(x), BLOCK_TOKENS):
            part = slice(first, first + BLOCK_TOKENS)
            logits = x[part] @ head.T
            peak = np.maximum(largest[part], logits.max(axis=1))
            total[part] *= np.exp(largest[part] - peak)
            total[part] += np.exp(logits - peak[:, None].astype(np.float32)).sum(axis=1, dtype=np.float64)
            largest[part] = peak
            here = np.flatnonzero((tokens[part] >= begin) & (tokens[part] < begin + len(head)))
            chosen[first + here] = logits[here, tokens[part][here] - begin]
    return largest + np.log(total) - chosen


def perplexity(nats: np.ndarray) -> float:
    """exp of the mean of what `losses` gives."""
    return float(np.exp(np.mean(nats)))
