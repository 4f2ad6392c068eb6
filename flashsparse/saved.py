"""Saved sessions: tokens, keys and values in one safetensors file, streamed so that no second KV cache is in memory.

Owns the file. What a session does with it is the session's; files are read strictly, since anyone may have written
them: nothing of the session changes before all but the keys and values themselves has been checked.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from flashsparse.errors import SessionError
from flashsparse.pack.safetensors import read_header, shape_bytes

if TYPE_CHECKING:
    from flashsparse.kvcache import KVCache
    from flashsparse.pack.safetensors import Header

SESSION_FORMAT = "flashsparse-session-1"
_ALIGN = 64


def save(path: str | os.PathLike[str], tokens: list[int], caches: list[KVCache], digest: str) -> None:
    """Write the session of the pack `digest`; the file appears whole or not at all. Raises SessionError."""
    target = Path(path)
    partial = target.with_name(f".{secrets.token_hex(6)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(_header(len(tokens), caches, digest))
            file.write(np.array(tokens, "<i8").tobytes())
            for cache in caches:
                for part in _parts(cache, cache.offset):
                    file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL byte
        _remove(partial)
        reason = error.strerror if isinstance(error, OSError) else error
        raise SessionError(f"{target}: the session could not be saved: {reason or error}") from error
    except BaseException:
        _remove(partial)
        raise


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except (OSError, ValueError):
        return


def _parts(cache: KVCache, held: int) -> list[np.ndarray]:
    """The first `held` positions in file order: flat views of the cache, one per head of keys, then of values."""
    return [head[:held].reshape(-1) for array in (cache.keys, cache.values) for head in array]


def _shapes(caches: list[KVCache], held: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Keys and values as they are in the file: name -> (dtype, shape [kv_heads, held, head_dim])."""
    return {
        f"{kind}.{index}": (cache.dtype, (array.shape[0], held, array.shape[2]))
        for index, cache in enumerate(caches)
        for kind, array in (("keys", cache.keys), ("values", cache.values))
    }


def _header(count: int, caches: list[KVCache], digest: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": SESSION_FORMAT, "pack": digest}}
    position = 0
    for name, (dtype, shape) in {"tokens": ("I64", (count,)), **_shapes(caches, caches[0].offset)}.items():
        end = position + shape_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // _ALIGN) * _ALIGN - 8
    return struct.pack("<Q", length) + text.ljust(length, b" ")


class SavedSession:
    """A saved session that fits the caches and the pack it was opened for: `tokens`, and keys and values to read.

    The file may hold more tokens than positions: the rest has to be fed. Raises SessionError for what does not fit.
    """

    def __init__(self, path: str | os.PathLike[str], caches: list[KVCache], digest: str, vocabulary: int) -> None:
        self.path, self._caches = Path(path), caches
        if not self.path.is_file():
            raise SessionError(f"{self.path}: there is no saved session; expected a file written by /save")
        self._header = read_header(self.path, error=SessionError)
        for key, value in (("format", SESSION_FORMAT), ("pack", digest)):
            found = self._header.metadata.get(key)
            if found != value:
                raise SessionError(f"{self.path}: {key} is {found!r}, expected {value!r}")
        self.held = _check_tensors(self._header, caches)
        self.tokens = self._read_tokens(vocabulary)

    def _read_tokens(self, vocabulary: int) -> list[int]:
        info = self._header.tensors["tokens"]
        values = np.empty(info.shape, np.int64)
        with self._open() as file:
            self._fill(file, info.begin, values)
        if ((values < 0) | (values >= vocabulary)).any():
            raise SessionError(f"{self.path}: a token lies outside the vocabulary of {vocabulary}")
        return [int(token) for token in values]

    def read_cache(self) -> None:
        """Read keys and values into the caches, whose positions the caller sets. Raises SessionError."""
        with self._open() as file:
            for index, cache in enumerate(self._caches):
                for kind, array in (("keys", cache.keys), ("values", cache.values)):
                    position = self._header.tensors[f"{kind}.{index}"].begin
                    for head in array:
                        part = head[: self.held].reshape(-1)
                        self._fill(file, position, part)
                        position += part.nbytes

    def _open(self) -> BinaryIO:
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise SessionError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _fill(self, file: BinaryIO, position: int, array: np.ndarray) -> None:
        view, done = array.view(np.uint8).data, 0
        try:
            file.seek(position)
            while done < len(view):
                got = file.readinto(view[done:])  # type: ignore[attr-defined]
                if not got:
                    raise SessionError(f"{self.path}: the file became shorter while it was read")
                done += got
        except OSError as error:
            raise SessionError(f"{self.path}: cannot be read: {error.strerror}") from error


def _check_tensors(header: Header, caches: list[KVCache]) -> int:
    """Names, types and shapes against the caches, sizes against their capacity; the positions held."""
    path, tensors, capacity = header.path, header.tensors, caches[0].capacity
    tokens, keys = tensors.get("tokens"), tensors.get("keys.0")
    if tokens is None or tokens.dtype != "I64" or len(tokens.shape) != 1:
        raise SessionError(f"{path}: tensor 'tokens' is missing or not a list of I64")
    if keys is None or len(keys.shape) != 3:
        raise SessionError(f"{path}: tensor 'keys.0' is missing or has not three dimensions")
    count, held = tokens.shape[0], keys.shape[1]
    expected = _shapes(caches, held)
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        # BF16 was once written as the integers that hold it.
        if found is None or found.shape != shape or found.dtype not in (dtype, "U16" if dtype == "BF16" else dtype):
            raise SessionError(f"{path}: tensor {name!r} is missing or not {dtype} of shape {list(shape)}")
    if unknown := set(tensors) - set(expected) - {"tokens"}:
        raise SessionError(f"{path}: tensor {min(unknown)!r} does not belong into a saved session")
    if count < held:
        raise SessionError(f"{path}: {count} tokens for {held} positions, expected at least as many")
    if held > capacity or count > max(capacity, held + 1):  # the last sampled token may be one too many to feed
        raise SessionError(
            f"{path}: {count} tokens do not fit the {capacity} of --max-kv-size; start with a larger --max-kv-size"
        )
    return held
