"""Resident weights: the buffers that hold a pack's resident and predictor files, and a typed view for each tensor.

Owns where resident bytes live and how they are addressed. When they are read is `loading.py`'s; computing with them is
the kernels' business.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.errors import PackError
from flashsparse.macos import PAGE_BYTES
from flashsparse.pack.safetensors import numpy_dtype

if TYPE_CHECKING:
    from flashsparse.flash import FlashFile
    from flashsparse.pack.manifest import Quant
    from flashsparse.pack.safetensors import Header, TensorInfo

ALIGNMENT = PAGE_BYTES  # a multiple of every sector size
HUGE_PAGE = 2 << 20
READ_BYTES = 4 << 20  # whole huge pages, so that what a read takes of memory is its own
PIECE = np.dtype([("offset", "<i8"), ("length", "<i8"), ("need", "<i8"), ("dest", "<u8"), ("stage", "<i8")])
SEGMENT_BYTES = 1 << 30


class Buffer:
    """`nbytes` (below 2 GiB) of page-aligned memory; `.bytes` is its numpy array, uint8.

    With `unified` it is MLX's, and `.array` the same bytes as an MLX array, so that Metal kernels can compute on it.
    Else it is an anonymous mapping: MLX would write zeros through all of it on one thread, where reads touch it first
    and in parallel.
    """

    def __init__(self, nbytes: int, unified: bool = False) -> None:
        self.array: Any = None
        self.bytes: np.ndarray
        if unified:
            self.array, self.bytes = _mlx_memory(nbytes)
        else:
            self.bytes = _mapped_memory(nbytes)
        self.nbytes = nbytes

    @property
    def address(self) -> int:
        return self.bytes.ctypes.data


def _mapped_memory(nbytes: int) -> np.ndarray:
    """In huge pages where the system has them: a direct read then is one transfer, not one for each small page."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    inside = nbytes - nbytes % HUGE_PAGE  # a huge page at the end would be memory that nobody asked for
    if inside and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, inside)
    return whole[start : start + nbytes]


def _mlx_memory(nbytes: int) -> tuple[Any, np.ndarray]:
    """An MLX array that begins at a page, and its writable alias."""
    import mlx.core as mx

    base = mx.zeros((nbytes + ALIGNMENT,), dtype=mx.uint8)
    mx.eval(base)
    whole = np.array(base, copy=False)
    start = -whole.ctypes.data % ALIGNMENT
    array = base[start : start + nbytes]
    mx.eval(array)
    return array, whole[start : start + nbytes]


@dataclass(frozen=True)
class Weight:
    """A resident tensor: plain (`quant` None) or MLX affine (packed words, scales and biases).

    `data` is a numpy alias of the stored bytes: [rows, cols] or [n]; bf16 appears as uint16. `scales` and `biases` are
    [rows, cols / group_size] in `dtype`.
    """

    name: str
    dtype: str
    data: np.ndarray
    scales: np.ndarray | None = None
    biases: np.ndarray | None = None
    quant: Quant | None = None

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def cols(self) -> int:
        return self.data.shape[1] * 32 // self.quant.bits if self.quant else self.data.shape[1]

    def float32(self) -> np.ndarray:
        """A float32 copy of a plain tensor."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return self.data.astype(np.float32)


@dataclass(frozen=True)
class Segment:
    """Neighbouring tensors in memory: the byte at file offset `start` is byte 0 of the buffer."""

    start: int
    buffer: Buffer
    tensors: list[TensorInfo]

    @property
    def nbytes(self) -> int:
        """As far as there are tensors."""
        return self.tensors[-1].end - self.start

    def stages(self, stage_of: Callable[[TensorInfo], int]) -> np.ndarray:
        """For each READ_BYTES of it the least that `stage_of` says of the tensors in there."""
        stages = np.full(-(-self.nbytes // READ_BYTES), np.iinfo(np.int64).max)
        for info in self.tensors:
            pieces = stages[(info.begin - self.start) // READ_BYTES : -(-(info.end - self.start) // READ_BYTES)]
            np.minimum(pieces, stage_of(info), out=pieces)
        return stages


class ResidentStore:
    """Every tensor of one safetensors file of a pack, in a few buffers. Raises PackError for a missing tensor.

    What the buffers hold is there when the reads of `pieces` are done, which the caller does.
    `quant`: base name -> quantization of the matrices that the file holds quantized. `nbytes`: of all buffers.
    More than one buffer because MLX's shapes are 32 bits wide and Metal limits the size of one; `unified`: MLX's own.
    The tensors named in `without` are left on flash.
    """

    def __init__(
        self,
        header: Header,
        file: FlashFile,
        quant: Mapping[str, Quant],
        unified: bool = False,
        without: Container[str] = (),
    ) -> None:
        self.file, self.unified = file, unified
        self._path, self._quant = header.path, quant
        self._tensors = {name: info for name, info in header.tensors.items() if name not in without}
        groups = _grouped(sorted(self._tensors.values(), key=lambda t: t.begin))
        self._segments = [self._segment(group) for group in groups]
        self._segment_of = {info.name: segment for segment in self._segments for info in segment.tensors}
        self.nbytes = sum(segment.buffer.nbytes for segment in self._segments)

    def _segment(self, tensors: list[TensorInfo]) -> Segment:
        """From the first byte, rounded down to a page."""
        start = tensors[0].begin // ALIGNMENT * ALIGNMENT
        return Segment(start, Buffer(_to_pages(tensors[-1].end - start), self.unified), tensors)

    def pieces(self, stage_of: Callable[[TensorInfo], int]) -> np.ndarray:
        """The reads that fill the buffers (PIECE [n]), in the order of the file.

        The `stage` of each is the least that `stage_of` says of the tensors it brings a part of.
        """
        return np.concatenate([np.empty(0, PIECE), *(self._pieces(segment, stage_of) for segment in self._segments)])

    def _pieces(self, segment: Segment, stage_of: Callable[[TensorInfo], int]) -> np.ndarray:
        starts = np.arange(0, segment.nbytes, READ_BYTES, dtype=np.int64)
        pieces = np.empty(len(starts), PIECE)
        pieces["offset"], pieces["dest"] = segment.start + starts, segment.buffer.address + starts
        pieces["need"] = needs = np.minimum(segment.nbytes - starts, READ_BYTES)
        pieces["length"] = _to_pages(needs) if self.file.direct else needs
        pieces["stage"] = segment.stages(stage_of)
        return pieces

    @property
    def buffers(self) -> list[Buffer]:
        """What holds the tensors, in the order of the file."""
        return [segment.buffer for segment in self._segments]

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Offset and bytes of what is read of the file."""
        return [(segment.start, segment.nbytes) for segment in self._segments]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> np.ndarray:
        """The numpy alias of the tensor stored under this exact name."""
        info = self._tensors.get(name)
        if info is None:
            raise PackError(f"{self._path}: tensor {name!r} is missing; convert the checkpoint again with --force")
        segment = self._segment_of[name]
        raw = segment.buffer.bytes[info.begin - segment.start : info.end - segment.start]
        return raw.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def weight(self, base: str) -> Weight:
        """The weight `<base>.weight`, with its scales and biases when the pack stores it quantized."""
        name = f"{base}.weight"
        quant = self._quant.get(base)
        data = self.tensor(name)
        if quant is None:
            return Weight(name, self._tensors[name].dtype, data)
        scales, biases = self.tensor(f"{base}.scales"), self.tensor(f"{base}.biases")
        return Weight(name, self._tensors[f"{base}.scales"].dtype, data, scales, biases, quant)

    def vector(self, name: str) -> np.ndarray | None:
        """A float32 copy of a small plain tensor (norm, bias), or None when the pack has none of that name."""
        if name not in self:
            return None
        return Weight(name, self._tensors[name].dtype, self.tensor(name)).float32()


def _to_pages(nbytes: Any) -> Any:
    """Bytes, or an array of them, rounded up."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def resident_bytes(file_bytes: int, cuts: int = 0) -> int:
    """Memory for this much of a file, in pieces between `cuts`: each segment is rounded out to pages at both ends."""
    segments = 1 + cuts + file_bytes // (SEGMENT_BYTES // 2)  # two neighbouring groups exceed SEGMENT_BYTES together
    return file_bytes + 3 * ALIGNMENT * segments


def _grouped(tensors: list[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Neighbours in the file without a gap, at most SEGMENT_BYTES; a larger tensor is a group of its own."""
    group: list[TensorInfo] = []
    for info in tensors:
        if group and (info.begin != group[-1].end or info.end - group[0].begin > SEGMENT_BYTES):
            yield group
            group = []
        group.append(info)
    if group:
        yield group
