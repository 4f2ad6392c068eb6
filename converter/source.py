"""A source checkpoint: its directory, its validated shards and its tensors, read by byte range.

Owns what is accepted as a checkpoint (safetensors and its index; never pickle). What the tensors mean is in `tensors`,
repository ids are in `hub`.
"""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from flashsparse.errors import CheckpointError, UsageError
from flashsparse.pack.safetensors import Header, TensorInfo, numpy_dtype, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_JSON_BYTES = 100 << 20
MAX_COPY_BYTES = 256 << 20
ORDERED_BYTES = 16 << 20  # read at once where rows or columns come in another order
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class SourceTensor:
    """One tensor and the shard that holds it. With an `order`, row (`axis` 0) or column (1) i is stored at order[i]."""

    path: Path
    info: TensorInfo
    order: np.ndarray | None = field(default=None, compare=False, repr=False)
    axis: int = 0

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape


@dataclass
class Checkpoint:
    """An opened checkpoint. `config` is config.json as it is; use as a context manager to close the shards."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    shards: tuple[Path, ...]
    _files: dict[Path, FileIO] = field(default_factory=dict)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def copies(self) -> list[Path]:
        """The tokenizer files that are there: regular files of a sane size, which go into the pack verbatim."""
        found = []
        for name in TOKENIZER_FILES:
            path = self.directory / name
            if not path.exists():
                continue
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_COPY_BYTES:
                raise CheckpointError(f"{path}: expected a regular file of at most {MAX_COPY_BYTES} bytes")
            found.append(path)
        return found

    def read_bytes(self, tensor: SourceTensor, begin: int, out: memoryview) -> None:
        """Fills `out` with the tensor's bytes from `begin` on. CheckpointError names the file and the offset."""
        position, done = tensor.info.begin + begin, 0
        try:
            file = self._open(tensor.path)
            file.seek(position)
            while done < len(out):
                got = file.readinto(out[done:])
                if not got:
                    raise CheckpointError(
                        f"{tensor.path}: tensor {tensor.info.name!r}: the file ends before byte {position + done}, "
                        f"expected {len(out) - done} more bytes; it changed while it was converted"
                    )
                done += got
        except OSError as problem:
            where = f"{tensor.path}: tensor {tensor.info.name!r}: byte {position + done}"
            raise CheckpointError(f"{where}: cannot be read: {problem.strerror}") from problem

    def rows(self, tensor: SourceTensor, begin: int, end: int) -> np.ndarray:
        """Rows [begin, end) of a tensor, all other axes whole; BF16 as uint16."""
        if tensor.order is not None:
            return self._ordered_rows(tensor, tensor.order, begin, end)
        out = np.empty((end - begin, *tensor.shape[1:]), numpy_dtype(tensor.dtype))
        row_bytes = tensor.info.nbytes // tensor.shape[0]
        self.read_bytes(tensor, begin * row_bytes, out.reshape(-1).view(np.uint8).data)
        return out

    def columns(self, tensor: SourceTensor, begin: int, end: int) -> np.ndarray:
        """Columns [begin, end) of a matrix [rows, cols] as [rows, end - begin]; BF16 as uint16."""
        rows, cols = tensor.shape
        if tensor.order is not None:
            return self._ordered_columns(tensor, tensor.order[begin:end])
        if (begin, end) == (0, cols):
            return self.rows(tensor, 0, rows)
        out = np.empty((rows, end - begin), numpy_dtype(tensor.dtype))
        item = out.dtype.itemsize
        for row in range(rows):
            self.read_bytes(tensor, (row * cols + begin) * item, out[row].view(np.uint8).data)
        return out

    def _ordered_rows(self, tensor: SourceTensor, order: np.ndarray, begin: int, end: int) -> np.ndarray:
        stored = replace(tensor, order=None)
        if tensor.axis == 1:
            return np.ascontiguousarray(self.rows(stored, begin, end)[:, order])
        if tensor.info.nbytes <= ORDERED_BYTES:
            return self.rows(stored, 0, tensor.shape[0])[order[begin:end]]
        out = np.empty((end - begin, *tensor.shape[1:]), numpy_dtype(tensor.dtype))
        for row, wanted in enumerate(order[begin:end].tolist()):
            out[row] = self.rows(stored, wanted, wanted + 1)[0]
        return out

    def _ordered_columns(self, tensor: SourceTensor, wanted: np.ndarray) -> np.ndarray:
        """Stored columns `wanted` [n] of a matrix as [rows, n], read in blocks of rows."""
        rows = tensor.shape[0]
        out = np.empty((rows, len(wanted)), numpy_dtype(tensor.dtype))
        step = max(1, rows * ORDERED_BYTES // tensor.info.nbytes)
        stored = replace(tensor, order=None)
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            out[begin:end] = self.rows(stored, begin, end)[:, wanted]
        return out

    def fingerprint(self) -> dict[str, str]:
        """File name -> what identifies its contents without reading all of the weights.

        Small files by SHA-256; shards by size, SHA-256 of the header and time of the last change.
        """
        result = {path.name: f"sha256 {_sha256(path)}" for path in [self.directory / CONFIG, *self.copies()]}
        for path in self.shards:
            header, status = read_header(path), path.stat()
            digest = _header_sha256(header)
            result[path.name] = f"{status.st_size} bytes, header {digest}, changed at {status.st_mtime_ns} ns"
        return result

    def _open(self, path: Path) -> FileIO:
        if path not in self._files:
            self._files[path] = FileIO(path, "rb")
        return self._files[path]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _header_sha256(header: Header) -> str:
    with header.path.open("rb") as file:
        return hashlib.sha256(file.read(header.data_offset)).hexdigest()


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens a checkpoint directory and validates every shard's header and the index.

    Raises UsageError when it is no directory, CheckpointError for pickle-only, malformed or incomplete ones.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: not a directory; expected a checkpoint directory or a repository id")
    config = read_json(directory / CONFIG)
    weight_map = _weight_map(directory)
    shards = tuple(directory / name for name in _shard_names(directory, weight_map))
    tensors: dict[str, SourceTensor] = {}
    for path in shards:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but {INDEX} names it")
        for name, info in read_header(path).tensors.items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is also in {tensors[name].path.name}, expected it once")
            tensors[name] = SourceTensor(path, info)
    if weight_map is not None:
        _check_index(directory / INDEX, weight_map, tensors)
    return Checkpoint(directory, config, tensors, shards)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError when it is missing, too large or something else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: found {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {path.parent} is not a Hugging Face checkpoint") from None
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path}: not JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def _weight_map(directory: Path) -> dict[str, str] | None:
    if not (directory / INDEX).exists():
        return None
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX}: weight_map: missing, expected tensor names and their files")
    for name, file in weight_map.items():
        # A name from the index must not lead out of the directory or to a pickle.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{directory / INDEX}: tensor {name!r}: found file {file!r}, expected *.safetensors")
    return weight_map


def _shard_names(directory: Path, weight_map: dict[str, str] | None) -> list[str]:
    single = (directory / SINGLE).exists()
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        if single and SINGLE not in names:
            raise CheckpointError(f"{directory}: both {SINGLE} and {INDEX}, which does not name it; remove one of them")
        return names
    if single:
        return [SINGLE]
    if (directory / "pack.json").exists():
        raise CheckpointError(f"{directory}: found a pack, expected the checkpoint that it was converted from")
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise CheckpointError(f"{directory}: found {_some(others)}, expected {SINGLE} or {INDEX}")
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory}: only pickle weights ({_some(pickles)}), which can run code when they are read; "
            "save the model as safetensors first (model.save_pretrained does) or use a repository that has them"
        )
    raise CheckpointError(f"{directory}: no weights, expected {SINGLE} or {INDEX}")


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, SourceTensor]) -> None:
    """The index and the shards' headers must name the same tensors in the same files."""
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise CheckpointError(f"{path}: tensor {_some(absent)}: in no shard, expected it in {weight_map[absent[0]]}")
    unknown = sorted(set(tensors) - set(weight_map))
    if unknown:
        raise CheckpointError(f"{tensors[unknown[0]].path}: tensor {_some(unknown)}: not named by {path.name}")
    for name, file in weight_map.items():
        if tensors[name].path.name != file:
            raise CheckpointError(f"{path}: tensor {name!r}: found in {tensors[name].path.name}, expected in {file}")


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
