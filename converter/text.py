"""Text to tokens for offline work: the tokenizer beside a model's weights, and texts read only as far as needed.

Code in a checkpoint is never run. Digests of texts are in `flashsparse.sparsity.texts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashsparse.errors import CheckpointError, UsageError
from flashsparse.sparsity.texts import open_text

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
PIECE_CHARS = 1 << 16  # of a text, encoded at once


@dataclass(frozen=True)
class TextTokenizer:
    """`encode` gives a text's token ids, with no special tokens added."""

    encode: Callable[[str], list[int]]


def load_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer of a checkpoint or pack. Raises CheckpointError when there is none or it cannot be loaded."""
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(
            f"{directory}: no tokenizer, expected {' or '.join(TOKENIZERS)}; "
            "copy the tokenizer files of the original model into this directory"
        )
    try:
        return TextTokenizer(_encoder(directory))
    except Exception as problem:  # tokenizers and transformers raise errors of every kind
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be loaded ({type(problem).__name__}: {reason}); "
            "replace it with the original model's"
        ) from problem


def _encoder(directory: Path) -> Callable[[str], list[int]]:
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    return lambda text: list(slow.encode(text, add_special_tokens=False))


def read_ids(tokenizer: TextTokenizer, paths: Sequence[Path], tokens: int) -> list[np.ndarray]:
    """The first token ids of each text, int64, at most `tokens` together: even shares; who has more fills the rest.

    Texts are UTF-8, or UTF-8 in zstandard (.zst); each is read only as far as needed. Raises UsageError for a file that
    cannot be read, is empty, or is no text.
    """
    streams = [_Stream(tokenizer, path) for path in paths]
    going, left = streams, tokens
    while going and left:
        share = -(-left // len(going))
        for stream in going:
            left -= stream.take(min(share, left))
        going = [stream for stream in going if not stream.ended]
    return [np.array(stream.ids, np.int64) for stream in streams]


class _Stream:
    """The tokens of one text, as many as were taken so far."""

    def __init__(self, tokenizer: TextTokenizer, path: Path) -> None:
        self.ids: list[int] = []
        self.ended = False
        self._waiting: list[int] = []
        self._more = (tokenizer.encode(piece) for piece in _pieces(path))

    def take(self, count: int) -> int:
        """Takes up to `count` more; how many there were."""
        while len(self._waiting) < count and not self.ended:
            piece = next(self._more, None)
            self.ended = piece is None
            self._waiting += piece or []
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        self.ids += taken
        return len(taken)


def _pieces(path: Path) -> Iterator[str]:
    """The text in pieces of about PIECE_CHARS that end after a line, or a word where lines are long."""
    empty, rest = True, ""
    try:
        with open_text(path) as text:
            while part := text.read(PIECE_CHARS):
                if "\0" in part:
                    raise UsageError(f"{path}: holds NUL characters, expected UTF-8 text")
                empty, rest = False, rest + part
                end = max(rest.rfind("\n"), rest.rfind(" ") if len(rest) > 2 * PIECE_CHARS else -1) + 1
                if end or len(rest) > 4 * PIECE_CHARS:
                    yield rest[: end or len(rest)]
                    rest = rest[end or len(rest) :]
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path}: not UTF-8 text ({problem.reason}), expected plain text, or .zst") from problem
    except OSError as problem:
        raise UsageError(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    if empty:
        raise UsageError(f"{path}: is empty, expected text")
    if rest:
        yield rest
