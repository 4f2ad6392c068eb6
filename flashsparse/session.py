"""One conversation: the KV cache, the tokens so far, the generation loop.

Owns feeding. mlx-lm's samplers choose tokens (sampling.py); the loop is our own because mlx-lm's computes one token
ahead: a whole extra token of reads before the first is shown, and a KV cache ahead of what the user saw. Whatever
changes the conversation happens inside `Engine.step`, one thread at a time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashsparse import saved
from flashsparse.arguments import token_ids
from flashsparse.detokenize import Detokenizer
from flashsparse.errors import ContextLengthError, SessionError, UsageError
from flashsparse.sampling import Sampler, check_sampling
from flashsparse.stats import Stats

if TYPE_CHECKING:
    from flashsparse.engine import Engine
    from flashsparse.kvcache import KVCache
    from flashsparse.models.decoder import Decoder


@dataclass(frozen=True)
class Piece:
    """One generated token. `text` may be empty while a character is incomplete, or when the pack has no tokenizer."""

    text: str
    token: int
    finish_reason: str | None
    stats: Stats


class Session:
    """A conversation over an Engine; get one from `engine.session()`. Use it as a context manager or close it.

    One thread at a time: a call while another thread computes raises SessionError. `close` waits instead.
    """

    def __init__(self, engine: Engine, caches: list[KVCache]) -> None:
        self._engine = engine
        self._caches = caches
        self._tokens: list[int] = []
        self._closed = False
        self._epoch = 0  # raised by whatever ends the generations begun before

    @property
    def tokens(self) -> list[int]:
        """Every token of the conversation, the last sampled one included."""
        return list(self._tokens)

    @property
    def fed(self) -> int:
        """How many of `tokens` the KV cache holds: all, or all but the last sampled one. 0 once closed."""
        return self._caches[0].offset if self._caches else 0

    @property
    def full(self) -> bool:
        """Whether nothing more can be fed or generated: the tokens fill the KV cache, and one waits beyond it."""
        return bool(self._caches) and len(self._tokens) > self._caches[0].capacity

    @property
    def remedy(self) -> str:
        """What helps a conversation that does not fit its KV cache."""
        if self._caches and self._caches[0].capacity >= self._engine.context_limit:
            return "that is the model's whole context: begin a new conversation (in chat: /clear)"
        return "start again with a larger --max-kv-size (and --dram if it does not fit)"

    def logits(self, token_ids: Sequence[int], *, last: bool = False) -> np.ndarray:
        """Feed the tokens and return the float32 logits after each, [T, V]; with `last` after the last alone, [1, V].

        Those of many tokens take much memory beside the budget. Many tokens are prefilled in chunks, one is decoded.
        Raises UsageError for ids outside the vocabulary or none, ContextLengthError when they do not fit the KV cache
        (the session is then unchanged).
        """
        self._check_open()
        ids = self._checked(token_ids)
        began = time.perf_counter()
        with self._engine.step() as decoder:
            self._check_open()
            waiting = len(self._tokens) - self.fed
            self._append(ids)
            self._epoch += 1
            if last:
                *_, hidden = (chunk[-1:] for chunk in self._feed(decoder))
                rows, waiting = [decoder.logits(hidden)], 0
            else:
                rows = [decoder.logits(hidden) for hidden in self._feed(decoder)]
            self._engine.counters.seconds += time.perf_counter() - began
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

        temp 0 is greedy; top_p in (0, 1], top_k 0 is off; a seed in 0..2**63-1 makes sampling repeatable. Stops at an
        end token (finish_reason "stop"), at max_tokens or where the KV cache is full ("length"; `full` tells which).
        Stopping the iteration early keeps what was yielded; another call that changes the conversation ends it with a
        SessionError. ContextLengthError: the prompt alone does not fit, and nothing was fed.
        Raises UsageError, ContextLengthError, FlashReadError, NumericError.
        """
        check_sampling(max_tokens, temp, top_p, top_k, seed)
        self._check_open()
        ids = self._checked(self._encode(prompt))
        sampler = Sampler(temp, top_p, top_k, seed, self._engine.manifest.vocab_size)
        with self._engine.step():  # refused while another thread's generation is in a step
            self._epoch += 1
            return self._generate(ids, max_tokens, sampler, self._epoch)

    def clear(self) -> None:
        """Forget the conversation; records in memory stay."""
        self._check_open()
        with self._engine.step():
            self._replace([], 0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens, keys and values to a safetensors file; it appears whole or not at all. Raises SessionError."""
        self._check_open()
        with self._engine.step():
            saved.save(path, self._tokens, self._caches, self._engine.manifest.digest)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace the conversation by a saved one of the same pack.

        Raises SessionError when it does not fit; the conversation is then as it was.
        """
        self._check_open()
        manifest = self._engine.manifest
        with self._engine.step():
            found = saved.SavedSession(path, self._caches, manifest.digest, manifest.vocab_size)
            self._replace(self._tokens, 0)  # should reading fail, what was there is fed again
            found.read_cache()
            self._replace(found.tokens, found.held)

    @property
    def closed(self) -> bool:
        """Whether the session has ended: by `close`, or with its engine."""
        return self._closed

    def close(self) -> None:
        """Give the KV cache back to the engine, after the step that another thread is in."""
        if not self._closed:
            with self._engine.exclusive():
                self._engine.release(self)

    def detach(self) -> None:
        """Called by the engine when the session ends: nothing refers to the caches any more."""
        self._closed = True
        self._epoch += 1
        self._caches = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _replace(self, tokens: list[int], held: int) -> None:
        self._epoch += 1
        self._tokens = list(tokens)
        for cache in self._caches:
            cache.offset = held

    def _generate(self, ids: list[int], max_tokens: int, sample: Sampler, epoch: int) -> Iterator[Piece]:
        """A token's time is everything between being asked for it and handing it out."""
        engine, stats = self._engine, self._engine.new_stats()
        text = Detokenizer(engine.tokenizer, [*self._tokens, *ids])
        for count in range(1, max_tokens + 1):
            began, before = time.perf_counter(), engine.counters.copy()
            token = self._next(ids if count == 1 else [], sample, epoch)
            ended = count == max_tokens or self.full
            reason = "stop" if token in engine.end_tokens else "length" if ended else None
            segment = text.add(token, reason)
            stats.generation_tokens = count
            stats.peak_memory_bytes = engine.peak_memory()
            engine.counters.seconds += time.perf_counter() - began
            stats.add(engine.counters - before)
            yield Piece(segment, token, reason, stats)
            if reason:
                return

    def _next(self, ids: list[int], sample: Sampler, epoch: int) -> int:
        """Feed `ids` and what waits, and choose the token that follows."""
        self._check_current(epoch)
        with self._engine.step() as decoder:
            self._check_current(epoch)
            self._append(ids)
            *_, hidden = (chunk[-1:] for chunk in self._feed(decoder))
            token = sample(decoder.logits(hidden))
            self._tokens.append(token)
        return token

    def _feed(self, decoder: Decoder) -> Iterator[np.ndarray]:
        """Feed the tokens that the KV cache does not hold, in chunks."""
        counters, chunk = self._engine.counters, self._engine.plan.chunk
        while self.fed < len(self._tokens):
            held = self.fed
            ids = self._tokens[held : held + chunk]
            try:
                hidden = decoder.forward(np.array(ids, np.int32), self._caches)
            except BaseException:
                # A failed or interrupted step leaves some layers ahead: put all back, so that it can be fed again.
                for cache in self._caches:
                    cache.offset = held
                raise
            counters.tokens += len(ids)
            counters.steps += 1
            yield hidden

    def _append(self, ids: list[int]) -> None:
        needed = len(self._tokens) + len(ids)
        capacity = self._caches[0].capacity
        if needed > capacity:
            raise ContextLengthError(
                f"the conversation needs {needed} tokens, but --max-kv-size reserved {capacity}; {self.remedy}"
            )
        self._tokens.extend(ids)

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self._engine.tokenizer is None:
            raise UsageError("this pack has no tokenizer: give the prompt as token ids")
        fresh = not self._tokens
        try:
            prompt.encode()  # a lone surrogate is no character
            ids: list[int] = self._engine.tokenizer.encode(prompt, add_special_tokens=fresh, verbose=False)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the tokenizer refuses the prompt ({type(error).__name__}: {reason})") from error
        if not ids and fresh:
            raise UsageError("the prompt is empty: give at least one character")
        return ids

    def _checked(self, values: Sequence[int]) -> list[int]:
        ids = token_ids(values, self._engine.manifest.vocab_size)
        if not ids and self.fed == len(self._tokens):
            raise UsageError("there are no tokens to feed: give at least one")
        return ids

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed; open another with engine.session()")

    def _check_current(self, epoch: int) -> None:
        self._check_open()
        if epoch != self._epoch:
            raise SessionError("the conversation was changed since this generation began; call generate() again")
