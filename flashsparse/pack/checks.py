"""Strict reading of a JSON document: every value is taken by name and type, and what was not taken is an error."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flashsparse.errors import DamagedPackError, PackError

T = TypeVar("T")
MAX_BYTES = 256 << 20
SHOWN_CHARS = 200  # of a value in a message
SHOWN_NAMES = 3


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """`value` as a message shows it: its repr, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def listed(names: Iterable[str]) -> str:
    """At most three names, and how many there are besides."""
    every = list(names)
    more = f" and {len(every) - SHOWN_NAMES} more" if len(every) > SHOWN_NAMES else ""
    return ", ".join(every[:SHOWN_NAMES]) + more


class Node:
    """One object of a document. Getters remember what they took; `finish` refuses the rest by name."""

    def __init__(self, value: Any, path: Path, where: str = "") -> None:
        self.path, self.where = path, where
        if not isinstance(value, dict):
            self._fail(value, "an object")
        self.value: dict[str, Any] = value
        self.left = set(value)

    @staticmethod
    def read(path: Path, sha256: str | None = None) -> tuple[Node, str]:
        """The document of a file and its text.

        Raises PackError when it is missing or not one JSON object, DamagedPackError when it is not of this SHA-256.
        """
        if "\0" in str(path):
            raise PackError(f"{str(path)!r}: not a path, since it holds a NUL character")
        try:
            if path.stat().st_size > MAX_BYTES:
                raise PackError(f"{path}: found {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
            data = path.read_bytes()
        except FileNotFoundError:
            remedy = "expected a folder that `flashsparse convert` made"
            if (path.parent / "config.json").is_file():
                remedy = f"if it is a checkpoint: `flashsparse convert {path.parent} DST`"
            raise PackError(f"{path}: missing; {path.parent} is not a pack; {remedy}") from None
        except OSError as problem:
            raise PackError(f"{path}: cannot be read: {problem.strerror}") from problem
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedPackError(f"{path}: does not match its checksum; run `flashsparse verify`")
        try:
            text = data.decode()
            return Node(json.loads(text, object_pairs_hook=_unique), path), text
        except (ValueError, RecursionError) as problem:
            raise PackError(f"{path}: not JSON: {problem}") from problem

    def name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _fail(self, found: Any, expected: str) -> NoReturn:
        raise PackError(f"{self.path}: {self.where or 'the document'}: found {shown(found)}, expected {expected}")

    def fail(self, key: str, found: Any, expected: str) -> NoReturn:
        raise PackError(f"{self.path}: {self.name(key)}: found {shown(found)}, expected {expected}")

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

    def agree(self, key: str, expected: Any) -> None:
        """Takes a value that the manifest states too."""
        found = self.take(key)
        if found != expected or type(found) is not type(expected):
            self.fail(key, found, f"{expected!r} (as in pack.json)")

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

    def integer(self, key: str, least: int, most: int | None = None) -> int:
        found = self.take(key)
        if not _is_integer(found) or not least <= found <= (most or 2**63 - 1):
            self.fail(key, found, f"an integer >= {least}" + (f" and <= {most}" if most else ""))
        return int(found)

    def real(self, key: str, zero: bool = False, negative: bool = False) -> float:
        """A finite number > 0, or >= 0 with `zero`, or any with `negative`."""
        found = self.take(key)
        number = isinstance(found, float) and math.isfinite(found)
        number = number or (_is_integer(found) and abs(found) < 2**63)
        if not number or not (negative or found > 0 or (zero and found == 0)):
            expected = "a finite number" if negative else f"a finite number {'>=' if zero else '>'} 0"
            self.fail(key, found, expected)
        return float(found)

    def token_ids(self, key: str) -> None:
        """Takes a token id, a list of them, or null."""
        found = self.take(key)
        items = found if isinstance(found, list) else [] if found is None else [found]
        if not all(_is_integer(item) and abs(item) < 2**63 for item in items):
            self.fail(key, found, "an integer, a list of integers or null")

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

    def sha256_set(self, key: str) -> tuple[str, ...]:
        """A list of digests in ascending order, each once; it may be empty."""
        found = self.sha256_list(key)
        if list(found) != sorted(set(found)):
            self.fail(key, list(found), "SHA-256 digests in ascending order, each once")
        return found

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
            names = listed(self.name(key) for key in sorted(self.left))
            raise PackError(f"{self.path}: unknown field {names}; this pack needs a newer FlashSparse")
        return result
