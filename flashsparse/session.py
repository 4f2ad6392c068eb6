"""One conversation: the KV cache, the tokens so far, the generation loop, saving and restoring.

Owns feeding and sampling. mlx-lm's samplers choose tokens; the loop is our own because mlx-lm's computes one token
ahead: a whole extra token of reads before the first is shown, and a KV cache ahead of what the user saw.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.errors import ContextLengthError, SessionError, UsageError
from flashsparse.stats import Counters, Stats

if TYPE_CHECKING:
    from flashsparse.engine import Engine
    from flashsparse.kvcache import KVCache

SESSION_FORMAT = "flashsparse-session-1"


@dataclass(frozen=True)
class Piece:
    """One generated token. `text` may be empty while a character is incomplete, or when the pack has no tokenizer."""

    text: str
    token: int
    finish_reason: str | None
    stats: Stats


class Session:
    """A conversation over an Engine; get one from `engine.session()`. Use it as a context manager or close it."""

    def __init__(self, engine: Engine, caches: list[KVCache]) -> None:
        self._engine = engine
        self._caches = caches
        self._tokens: list[int] = []
        self._closed = False

    @property
    def tokens(self) -> list[int]:
        """Every token of the conversation, the last sampled one included."""
        return list(self._tokens)

    @property
    def fed(self) -> int:
        """How many of `tokens` the KV cache holds: all, or all but the last sampled one."""
        return self._caches[0].offset

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Feed the tokens and return the float32 logits after each, [T, V].

        Many tokens are prefilled in chunks, one is decoded. Raises UsageError for ids outside the vocabulary or none,
        ContextLengthError when they do not fit the KV cache (the session is then unchanged).
        """
        ids = self._checked(token_ids)
        waiting = len(self._tokens) - self.fed
        self._append(ids)
        rows = [self._engine.decoder.logits(h) for h in self._feed(Counters())]
        return np.concatenate(rows)[waiting:]

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
    ) -> Iterator[Piece]:
        """Continue the conversation with `prompt`, then sample up to `max_tokens` tokens, yielding each as it is made.

        temp 0 is greedy; top_p in (0, 1], top_k 0 is off; a seed makes sampling repeatable. Stops at an end token
        (finish_reason "stop") or at max_tokens ("length"). Stopping the iteration early keeps what was yielded.
        Raises UsageError, ContextLengthError, FlashReadError.
        """
        _check_sampling(max_tokens, temp, top_p, top_k)
        ids = self._checked(self._encode(prompt))
        return self._generate(ids, max_tokens, _sampler(temp, top_p, top_k, seed))

    def clear(self) -> None:
        """Forget the conversation; records in memory stay."""
        self._check_open()
        self._tokens.clear()
        for cache in self._caches:
            cache.offset = 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens, keys and values to a safetensors file; it appears whole or not at all."""
        from safetensors.numpy import save_file

        self._check_open()
        tensors: dict[str, np.ndarray] = {"tokens": np.array(self._tokens, np.int64)}
        for index, cache in enumerate(self._caches):
            tensors[f"keys.{index}"] = np.ascontiguousarray(cache.keys[:, : cache.offset])
            tensors[f"values.{index}"] = np.ascontiguousarray(cache.values[:, : cache.offset])
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            save_file(tensors, partial, metadata={"format": SESSION_FORMAT, "pack": self._engine.manifest.digest})
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise SessionError(f"{target}: the session could not be saved: {error.strerror or error}") from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the conversation by a saved one of the same pack. Raises SessionError when it does not fit."""
        from flashsparse.pack.safetensors import read_header

        self._check_open()
        source = Path(path)
        if not source.is_file():
            raise SessionError(f"{source}: there is no saved session; expected a file written by /save")
        header = read_header(source, error=SessionError)
        expected = {"format": SESSION_FORMAT, "pack": self._engine.manifest.digest}
        for key, value in expected.items():
            if header.metadata.get(key) != value:
                raise SessionError(f"{source}: {key} is {header.metadata.get(key)!r}, expected {value!r}")
        self._restore(source, header.tensors)

    def close(self) -> None:
        """Give the KV cache back to the engine."""
        if not self._closed:
            self._closed = True
            self._engine.release(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _restore(self, source: Path, tensors: dict[str, Any]) -> None:
        """Shapes and types are checked against this engine before anything is read."""
        from safetensors.numpy import load_file

        count = tensors["tokens"].shape[0] if "tokens" in tensors else -1
        held = tensors["keys.0"].shape[1] if "keys.0" in tensors and len(tensors["keys.0"].shape) == 3 else -1
        if not 0 <= held <= self._caches[0].capacity or count not in (held, held + 1):
            raise SessionError(
                f"{source}: {count} tokens and {held} positions, expected at most {self._caches[0].capacity}; "
                "start with a larger --max-kv-size"
            )
        shape = (self._caches[0].keys.shape[0], held, self._caches[0].keys.shape[2])
        item = self._caches[0].keys.itemsize
        for index in range(len(self._caches)):
            for name in (f"keys.{index}", f"values.{index}"):
                found = tensors.get(name)
                if found is None or found.shape != shape or found.end - found.begin != item * int(np.prod(shape)):
                    raise SessionError(f"{source}: tensor {name!r} is not {shape} of {item} bytes each")
        stored = load_file(source)
        tokens = [int(t) for t in stored["tokens"]]
        if any(not 0 <= t < self._engine.manifest.vocab_size for t in tokens):
            raise SessionError(f"{source}: a token lies outside the vocabulary")
        for index, cache in enumerate(self._caches):
            cache.keys[:, :held] = stored[f"keys.{index}"].view(cache.keys.dtype)
            cache.values[:, :held] = stored[f"values.{index}"].view(cache.values.dtype)
            cache.offset = held
        self._tokens = tokens

    def _generate(self, ids: list[int], max_tokens: int, sample: Any) -> Iterator[Piece]:
        engine, began = self._engine, time.perf_counter()
        stats = engine.new_stats()
        self._append(ids)
        hidden = self._last(stats.prefill)
        stats.prefill.seconds = time.perf_counter() - began
        text = _Detokenizer(engine.tokenizer)
        for count in range(1, max_tokens + 1):
            token = sample(engine.decoder.logits(hidden))
            self._tokens.append(token)
            if count == 1:
                stats.time_to_first_token_s = time.perf_counter() - began
            reason = "stop" if token in engine.end_tokens else "length" if count == max_tokens else None
            stats.generation_tokens = count
            stats.peak_memory_bytes = engine.peak_memory()
            yield Piece(text.last(token, reason), token, reason, stats)
            if reason:
                return
            step = time.perf_counter()
            hidden = self._last(stats.decode)
            stats.decode.seconds += time.perf_counter() - step

    def _last(self, counters: Counters) -> np.ndarray:
        """Feed what waits; the hidden state of the last token [1, d]."""
        last = None
        for hidden in self._feed(counters):
            last = hidden
        assert last is not None
        return last[-1:]

    def _feed(self, counters: Counters) -> Iterator[np.ndarray]:
        """Feed the tokens that the KV cache does not hold, in chunks; counts what it cost into `counters`."""
        chunk = self._engine.manifest.prefill_chunk
        while self.fed < len(self._tokens):
            ids = self._tokens[self.fed : self.fed + chunk]
            before = self._engine.counters.copy()
            offsets = self.fed
            try:
                hidden = self._engine.decoder.forward(np.array(ids, np.int32), self._caches)
            except BaseException:
                # A failed or interrupted step leaves some layers ahead: put all back, so that it can be fed again.
                for cache in self._caches:
                    cache.offset = offsets
                raise
            cost = self._engine.counters - before
            for name in ("flash_bytes", "flash_reads", "needed_bytes", "hits", "misses", "active", "candidates"):
                setattr(counters, name, getattr(counters, name) + getattr(cost, name))
            counters.rounds += cost.rounds
            counters.io_wait_s += cost.io_wait_s
            counters.ffn_s += cost.ffn_s
            counters.tokens += len(ids)
            counters.steps += 1
            yield hidden

    def _append(self, ids: list[int]) -> None:
        needed = len(self._tokens) + len(ids)
        capacity = self._caches[0].capacity
        if needed > capacity:
            raise ContextLengthError(
                f"the conversation has {len(self._tokens)} tokens and {len(ids)} more make {needed}, but --max-kv-size "
                f"reserved {capacity}; start again with a larger --max-kv-size (and --dram if it does not fit)"
            )
        self._tokens.extend(ids)

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._engine.tokenizer is None:
            raise UsageError("this pack has no tokenizer: give the prompt as token ids")
        fresh = not self._tokens
        ids: list[int] = self._engine.tokenizer.encode(prompt, add_special_tokens=fresh)
        if not ids and fresh:
            raise UsageError("the prompt is empty: give at least one character")
        return ids

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        self._check_open()
        ids = [int(t) for t in token_ids]
        if not ids and self.fed == len(self._tokens):
            raise UsageError("there are no tokens to feed: give at least one")
        vocabulary = self._engine.manifest.vocab_size
        for token in ids:
            if not 0 <= token < vocabulary:
                raise UsageError(f"token {token} lies outside the vocabulary of {vocabulary}")
        return ids

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed; open another with engine.session()")


class _Detokenizer:
    """Text of tokens as they come, by the tokenizer's streaming detokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._stream = tokenizer.detokenizer if tokenizer is not None else None
        if self._stream is not None:
            self._stream.reset()

    def last(self, token: int, reason: str | None) -> str:
        """The text that this token completes; an end token itself has none."""
        if self._stream is None:
            return ""
        if reason != "stop":
            self._stream.add_token(token)
        if reason:
            self._stream.finalize()
        return str(self._stream.last_segment)


def _check_sampling(max_tokens: int, temp: float, top_p: float, top_k: int) -> None:
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, expected at least 1")
    if not 0 <= temp < float("inf"):
        raise UsageError(f"temp is {temp}, expected 0 or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}, expected more than 0 and at most 1")
    if top_k < 0:
        raise UsageError(f"top_k is {top_k}, expected 0 (off) or more")


def _sampler(temp: float, top_p: float, top_k: int, seed: int | None) -> Any:
    """A function from logits [1, V] to a token; greedy needs no MLX."""
    if temp == 0:
        return lambda logits: int(np.argmax(logits[0]))
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    if seed is not None:
        mx.random.seed(seed)
    choose = make_sampler(temp=temp, top_p=top_p, top_k=top_k)

    def sample(logits: np.ndarray) -> int:
        scores = mx.array(logits)
        return int(choose(scores - mx.logsumexp(scores, axis=-1, keepdims=True)).item())

    return sample
