"""Streaming text: spaces between prompt and continuation, characters of several tokens, end tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from flashsparse.detokenize import Detokenizer

MODEL = Path(__file__).resolve().parents[2] / "flashsparse" / "demo_model"


@pytest.mark.parametrize("text", [" there was a café", "s, he said \N{SLIGHTLY SMILING FACE}!", "\n\n  two lines"])
def test_pieces_are_the_text_that_follows_the_prompt(text: str) -> None:
    fast = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    stream = Detokenizer(SimpleNamespace(backend_tokenizer=fast), fast.encode("Once upon a time").ids)
    assert "".join(stream.add(token, None) for token in fast.encode(text).ids) == text


def test_an_end_token_has_no_text() -> None:
    fast = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert Detokenizer(SimpleNamespace(backend_tokenizer=fast), [5]).add(0, "stop") == ""
    assert Detokenizer(None, [5]).add(7, None) == ""
