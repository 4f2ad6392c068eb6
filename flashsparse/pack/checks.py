"""Strict reading of a JSON document: every value is taken by name and type, and what was not taken is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flashsparse.errors import PackError

T = TypeVar("T")
MAX_BYTES = 256 << 20


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


class Node:
    """One object of a document. Getters remember what they took; `finish` refuses the rest by name."""

    def __init__(self, value: Any, path: Path, where: str = "") -> None:
        self.path, self.where = path, where
        if not isinstance(value, dict):
            self._fail(value, "an object")
        self.value: dict[str, Any] = value
        self.left = set(value)

    @staticmethod
    def read(path: Path) -> tuple[Node, str]:
        """The document of a file and its text. Raises PackError when it is missing or not one JSON object."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise PackError(f"{path}: found {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
            text = path.read_text("utf-8")
            return Node(json.loads(text, object_pairs_hook=_unique), path), text
        except FileNotFoundError:
            raise PackError(f"{path}: missing; {path.parent} is not a pack") from None
        except OSError as problem:
            raise PackError(f"{path}: cannot be read: {problem.strerror}") from problem
        except (ValueError, RecursionError) as problem:
            raise PackError(f"{path}: not JSON: {problem}") from problem

    def name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _fail(self, found: Any, expected: str) -> NoReturn:
        raise PackError(f"{self.path}: {self.where or 'the document'}: found {found!r}, expected {expected}")

    def fail(self, key: str, found: Any, expected: str) -> NoReturn:
        raise PackError(f"{self.path}: {self.name(key)}: found {found!r}, expected {expected}")

    def has(self, key: str) -> bool:
        return key in self.value

    def take(self, key: str) -> Any:
        if key not in self.value:
            raise PackError(f"{self.path}: {self.name(key)}: missing")
        self.left.discard(key)
        return self.value[key]

    def equal(self, key: str, expected: Any) -> None:
        found = self.take(key)
        if found != expected or type(found) is not type(expected):
            self.fail(key, found, f"{expected!r}, the only one this version reads")

    def choice(self, key: str, allowed: Sequence[T]) -> T:
        found: T = self.take(key)
        if found not in allowed or isinstance(found, bool | float):
            self.fail(key, found, f"one of {', '.join(map(str, allowed))}")
        return found

    def boolean(self, key: str) -> bool:
        found = self.take(key)
        if not isinstance(found, bool):
            self.fail(key, found, "true or false")
        return found

    def integer(self, key: str, least: int) -> int:
        found = self.take(key)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found < 2**63:
            self.fail(key, found, f"an integer >= {least}")
        return found

    def number(self, key: str) -> float | None:
        found = self.take(key)
        if found is not None and (not isinstance(found, float) or not math.isfinite(found)):
            self.fail(key, found, "a floating-point number or null")
        return found

    def text(self, key: str) -> str:
        found = self.take(key)
        if not isinstance(found, str):
            self.fail(key, found, "a string")
        return found

    def sha256(self, key: str) -> str:
        return self._sha256(key, self.text(key))

    def sha256_list(self, key: str) -> tuple[str, ...]:
        found = self.take(key)
        if not isinstance(found, list):
            self.fail(key, found, "a list of SHA-256 digests")
        return tuple(self._sha256(key, item) for item in found)

    def _sha256(self, key: str, found: Any) -> str:
        if not isinstance(found, str) or len(found) != 64 or set(found) - set("0123456789abcdef"):
            self.fail(key, found, "64 lower-case hexadecimal digits")
        return found

    def null(self, key: str) -> bool:
        return self.take(key) is None

    def child(self, key: str) -> Node:
        return Node(self.take(key), self.path, self.name(key))

    def children(self) -> list[tuple[str, Node]]:
        """Every value of an object whose keys are names, not fields."""
        return [(key, self.child(key)) for key in self.value]

    def items(self, key: str) -> list[Node]:
        found = self.take(key)
        if not isinstance(found, list):
            self.fail(key, found, "a list of objects")
        return [Node(item, self.path, f"{self.name(key)}[{index}]") for index, item in enumerate(found)]

    def finish(self, result: T) -> T:
        """Returns `result`; raises PackError naming the fields nobody took."""
        if self.left:
            names = ", ".join(self.name(key) for key in sorted(self.left))
            raise PackError(f"{self.path}: unknown field {names}; this pack needs a newer FlashSparse")
        return result
