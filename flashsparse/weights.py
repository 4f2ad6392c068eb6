"""Resident weights: the buffers that hold a pack's resident and predictor files, and a typed view for each tensor.

Owns where resident bytes live and how they are addressed. Reading goes through `flash`; computing with them is the
kernels' business.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.errors import PackError
from flashsparse.macos import PAGE_BYTES, announce, here
from flashsparse.pack.safetensors import numpy_dtype

if TYPE_CHECKING:
    from flashsparse.flash import Batch, FlashFile, ReadPool
    from flashsparse.pack.manifest import Quant
    from flashsparse.pack.safetensors import Header, TensorInfo

ALIGNMENT = PAGE_BYTES  # a multiple of every sector size
HUGE_PAGE = 2 << 20
READ_BYTES = 4 << 20
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
    """A stretch of the file in memory: the byte at file offset `start` is byte 0 of the buffer."""

    start: int
    buffer: Buffer


class ResidentStore:
    """Every tensor of one safetensors file of a pack, read into a few buffers. Raises PackError for a missing tensor.

    Making it starts the reads, large and in the order of the file; `wait` for them before asking for a tensor.
    `quant`: base name -> quantization of the matrices that the file holds quantized. `nbytes`: of all buffers.
    More than one buffer because MLX's shapes are 32 bits wide and Metal limits the size of one; `unified`: MLX's own.
    The tensors named in `without` are left on flash.
    """

    def __init__(
        self,
        header: Header,
        pool: ReadPool,
        file: FlashFile,
        quant: Mapping[str, Quant],
        unified: bool = False,
        without: Container[str] = (),
    ) -> None:
        self._path, self._quant, self._unified = header.path, quant, unified
        self._tensors = {name: info for name, info in header.tensors.items() if name not in without}
        self._segment_of: dict[str, Segment] = {}
        self._batches: list[Batch] = []
        self.nbytes = 0
        try:
            for group in _grouped(sorted(self._tensors.values(), key=lambda t: t.begin)):
                segment = self._start(pool, file, group[0].begin, group[-1].end)
                self._segment_of.update({info.name: segment for info in group})
        except BaseException:
            self.release()
            raise

    def _start(self, pool: ReadPool, file: FlashFile, begin: int, end: int) -> Segment:
        """Begin to read the file from `begin`, rounded down to a page, to `end`."""
        start = begin // ALIGNMENT * ALIGNMENT
        segment = Segment(start, Buffer(-(-(end - start) // ALIGNMENT) * ALIGNMENT, self._unified))
        starts = np.arange(0, end - start, READ_BYTES, dtype=np.int64)
        needs = np.minimum(end - start - starts, READ_BYTES)
        lengths = -(-needs // ALIGNMENT) * ALIGNMENT if file.direct else needs
        if here() and not file.direct:
            announce(file.fd, start, end - start)
        self._batches.append(pool.submit(file, start + starts, lengths, needs, segment.buffer.address + starts))
        self.nbytes += segment.buffer.nbytes
        return segment

    @property
    def buffers(self) -> list[Buffer]:
        """What holds the tensors, in the order of the file."""
        return list(dict.fromkeys(segment.buffer for segment in self._segment_of.values()))

    def wait(self) -> None:
        """Until every byte is there. Raises FlashReadError when reading failed."""
        for batch in self._batches:
            batch.wait()
        self.release()

    def release(self) -> None:
        """Drop the reads that have not begun and wait for those in flight. Idempotent; the buffers stay."""
        while self._batches:
            self._batches[-1].release()
            self._batches.pop()

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
