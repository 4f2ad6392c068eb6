"""Text to tokens for offline work: the tokenizer beside a model's weights. Code in a checkpoint is never run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashsparse.errors import CheckpointError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


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
