"""What a chat feeds into its session: turns rendered by the chat template, or plain text continued.

Owns the messages and the rule that only new tokens are fed. Knows no terminal; generation belongs to Session.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashsparse.cli.options import Sampling
from flashsparse.errors import SessionError, UsageError

if TYPE_CHECKING:
    from flashsparse import Engine, Piece, Session


@dataclass
class Conversation:
    """A session and the turns behind it. `messages` stays empty when the tokenizer has no chat template."""

    engine: Engine
    session: Session
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def templated(self) -> bool:
        """Whether turns are rendered by the tokenizer's chat template."""
        return bool(self.engine.tokenizer is not None and self.engine.tokenizer.has_chat_template)

    def reply(self, text: str, sampling: Sampling) -> Iterator[Piece]:
        """Feed one turn and stream the answer; stopping early keeps what was said so far."""
        if not self.templated:
            yield from self.session.generate(self._plain(text), **vars(sampling))
            return
        said: list[str] = []
        turns = [*self.messages, {"role": "user", "content": text}]
        pieces = self.session.generate(self._new_tokens(turns), **vars(sampling))
        try:
            for piece in pieces:
                said.append(piece.text)
                yield piece
        finally:
            if said:  # a turn that could not be fed leaves the conversation as it was
                self.messages = [*turns, {"role": "assistant", "content": "".join(said)}]

    def clear(self) -> None:
        """Start anew; settings stay."""
        self.session.clear()
        self.messages = []

    def save(self, path: Path) -> None:
        """Write the session to `path` and its turns beside it."""
        if not path.name:
            raise UsageError(f"{path} names no file")
        self.session.save(path)
        turns = {"system": self.system, "messages": self.messages}
        beside = _turns_path(path)
        try:
            beside.write_text(json.dumps(turns, indent=1), encoding="utf-8")
        except OSError as error:
            raise SessionError(f"{beside}: the turns could not be saved: {error.strerror or error}") from error

    def load(self, path: Path) -> None:
        """Replace the conversation by a saved one."""
        system, messages = _read_turns(path)
        self.session.load(path)
        self.system, self.messages = system, messages

    def _plain(self, text: str) -> str | list[int]:
        """Text that continues what is there, on a line of its own; token ids where the pack has no tokenizer."""
        from flashsparse.cli.generate import to_prompt

        follows = self.session.tokens and self.engine.tokenizer is not None
        return to_prompt(self.engine, f"\n{text}" if follows else text)

    def _new_tokens(self, turns: list[dict[str, str]]) -> list[int]:
        """The rendered conversation less what the session holds; fed from the start where the two disagree."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        rendered = self._render([*system, *turns])
        held = self.session.tokens
        if len(held) < len(rendered) and rendered[: len(held)] == held:
            return rendered[len(held) :]
        self.session.clear()
        return rendered

    def _render(self, turns: list[dict[str, str]]) -> list[int]:
        tokenizer: Any = self.engine.tokenizer
        try:
            tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
        except Exception as error:
            # Templates are programs of the model's authors: many refuse a system prompt, in words of their own.
            raise UsageError(f"the model's chat template refuses this conversation: {error}") from error
        return [int(token) for token in tokens]


def _turns_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.turns.json")


def _read_turns(path: Path) -> tuple[str | None, list[dict[str, str]]]:
    if not path.name:
        raise UsageError(f"{path} names no file")
    turns = _turns_path(path)
    try:
        saved = json.loads(turns.read_text(encoding="utf-8"))
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in saved["messages"]]
        system = saved["system"]
        if not isinstance(system, str | None):
            raise TypeError(f"system is {type(system).__name__}")
        return system, messages
    except FileNotFoundError:
        return None, []
    except OSError as error:
        raise SessionError(f"{turns}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SessionError(f"{turns}: not the turns of a saved chat: {error}") from error
