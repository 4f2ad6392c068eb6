"""Text of tokens as they come: what each token completes, given what stands before it.

The `tokenizers` library's own stream is used wherever there is a fast tokenizer: mlx-lm's drops the space at the
beginning of a continuation. Slow tokenizers fall back to mlx-lm's.
"""

from __future__ import annotations

from typing import Any

CONTEXT = 16  # tokens before the first that decide how it begins


class Detokenizer:
    """`before` are the token ids of the conversation so far; without a tokenizer every text is empty."""

    def __init__(self, tokenizer: Any, before: list[int]) -> None:
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._slow: Any = None
        if self._fast is not None:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(ids=before[-CONTEXT:], skip_special_tokens=False)
        elif tokenizer is not None:
            self._slow = tokenizer.detokenizer
            self._slow.reset()

    def add(self, token: int, reason: str | None) -> str:
        """The text that this token completes; an end token (`reason` "stop") has none of its own."""
        if self._fast is not None:
            return "" if reason == "stop" else self._stream.step(self._fast, token) or ""
        if self._slow is None:
            return ""
        if reason != "stop":
            self._slow.add_token(token)
        if reason:
            self._slow.finalize()
        return str(self._slow.last_segment)
