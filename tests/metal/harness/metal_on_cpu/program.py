"""One compiled kernel and the running of it: buffers as numpy arrays in, outputs or a fault out.

Owns the C structures of `shim/runtime.h`. Raises the exceptions of `faults`; a message names the buffer, the byte, the
lane, the threadgroup and the line of the printed source.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .build import build
from .faults import KINDS, KernelFault, MetalOnCpuError, OrderDependent
from .translate import Buffer, Kernel, translate

THREADGROUP_BYTES = 32 << 10  # every Apple GPU's limit
MAX_THREADS = 1024
UNWRITTEN = 0xFF  # what bytes that the kernel did not write hold: NaN, or -1

Dim3 = tuple[int, int, int]


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("output", ctypes.c_int32),
        ("initialised", ctypes.c_int32),
    )


class _Report(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("buffer", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("bytes", ctypes.c_int32),
        ("write", ctypes.c_int32),
        ("lane", ctypes.c_int32),
        ("other", ctypes.c_int32),
        ("line", ctypes.c_int32),
        ("group", ctypes.c_int32 * 3),
        ("pc", ctypes.c_uint64),
        ("text", ctypes.c_char * 200),
    )


class _Run(ctypes.Structure):
    _fields_ = (
        ("buffers", ctypes.POINTER(_Buffer)),
        ("count", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_void_p),
        ("groups", ctypes.c_uint64),
        ("reverse_lanes", ctypes.c_int32),
        ("threadgroup_bytes", ctypes.c_uint32),
        ("written", ctypes.POINTER(ctypes.c_void_p)),
        ("report", _Report),
        ("accesses", ctypes.c_uint64),
        ("collectives", ctypes.c_uint64),
        ("peak_threadgroup_bytes", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Ran:
    """What one run left. `written` has, for each output, whether each byte was; `accesses` counts memory accesses."""

    outputs: dict[str, np.ndarray]
    written: dict[str, np.ndarray]
    accesses: int
    collectives: int
    threadgroup_bytes: int


class Program:
    """A kernel from its printed source, compiled or taken from the cache."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.kernel: Kernel = translate(source)
        self.library: Path = build(self.kernel.cpp)
        self._run = ctypes.CDLL(str(self.library)).msl_run
        self._run.argtypes = [ctypes.POINTER(_Run)]
        self._lock = threading.Lock()

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, tuple[Sequence[int], np.dtype | type]],
        grid: Dim3,
        threadgroup: Dim3,
        *,
        order: Sequence[int] | np.ndarray | None = None,
        reverse_lanes: bool = False,
        init_value: float | None = None,
    ) -> Ran:
        """Run once over `grid` threads. `order`: the threadgroups' linear numbers as they run; all once.

        Raises KernelFault's subclasses, and ValueError for buffers and sizes that do not fit the kernel.
        """
        group = _group_size(grid, threadgroup)
        sequence = _order(order, grid, group)
        made = {name: _blank(shape, dtype, init_value) for name, (shape, dtype) in outputs.items()}
        written = {name: np.zeros(max(array.nbytes, 1), np.uint8) for name, array in made.items()}
        arrays = [self._array(buffer, inputs, made) for buffer in self.kernel.buffers]
        run = _Run()
        run.buffers = (_Buffer * (len(arrays) + 1))(
            *(
                _Buffer(array.ctypes.data, array.nbytes, buffer.output, init_value is not None)
                for buffer, array in zip(self.kernel.buffers, arrays, strict=True)
            )
        )
        marks = [written[b.name].ctypes.data if b.output else None for b in self.kernel.buffers]
        run.written = (ctypes.c_void_p * (len(arrays) + 1))(*marks)
        run.count, run.groups, run.order = len(arrays), len(sequence), sequence.ctypes.data
        run.grid[:], run.threadgroup[:] = grid, group
        run.reverse_lanes, run.threadgroup_bytes = reverse_lanes, THREADGROUP_BYTES
        with self._lock:
            status = self._run(ctypes.byref(run))
        if status:
            raise self._fault(run.report) if status > 0 else MetalOnCpuError("no memory for the lanes' stacks")
        marked = {name: mark[: made[name].nbytes].astype(bool) for name, mark in written.items()}
        return Ran(made, marked, run.accesses, run.collectives, run.peak_threadgroup_bytes)

    def check(
        self,
        inputs: Mapping[str, np.ndarray],
        outputs: Mapping[str, tuple[Sequence[int], np.dtype | type]],
        grid: Dim3,
        threadgroup: Dim3,
        *,
        init_value: float | None = None,
        orders: int = 3,
    ) -> Ran:
        """Run in `orders` orders: ascending; descending, lanes too; shuffled. Raises OrderDependent on other bits."""
        first = self.run(inputs, outputs, grid, threadgroup, init_value=init_value)
        count = len(_order(None, grid, _group_size(grid, threadgroup)))
        rng = np.random.default_rng(count)
        for trial in range(1, orders):
            order = np.arange(count)[::-1] if trial == 1 else rng.permutation(count)
            again = self.run(
                inputs, outputs, grid, threadgroup, order=order, reverse_lanes=trial % 2 == 1, init_value=init_value
            )
            _compare(first, again)
        return first

    def _array(self, buffer: Buffer, inputs: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray]) -> np.ndarray:
        if buffer.output:
            if buffer.name not in made:
                raise ValueError(f"the kernel writes {buffer.name}, which is not among the outputs {sorted(made)}")
            return made[buffer.name]
        found = _input(buffer.name, inputs)
        if not found.flags.c_contiguous:
            raise ValueError(f"input {buffer.name}: expected a contiguous array")
        return found

    def _fault(self, report: _Report) -> KernelFault:
        kind = KINDS[report.kind]
        assert kind is not None
        line = report.line or (source_line(self.library, report.pc) if report.pc else 0)
        names = {-1: "threadgroup memory", -2: "memory"}
        what = names.get(report.buffer) or self.kernel.buffers[report.buffer].name
        parts = [report.text.decode()]
        if report.bytes:
            verb = "write" if report.write else "read"
            parts.append(f"{verb} of {report.bytes} bytes at byte {report.offset} of {what}")
        others = f" (other lane {report.other})" if report.other >= 0 else ""
        parts.append(f"lane {report.lane}{others} of threadgroup {tuple(report.group)}")
        return kind("; ".join(parts) + f"; line {line}: {self._line(line)}", line)

    def _line(self, line: int) -> str:
        lines = self.source.splitlines()
        return lines[line - 1].strip() if 0 < line <= len(lines) else "unknown"


def _group_size(grid: Dim3, threadgroup: Dim3) -> Dim3:
    if any(size < 1 for size in (*grid, *threadgroup)):
        raise ValueError(f"grid {grid}, threadgroup {threadgroup}: expected sizes of at least 1")
    if int(np.prod(threadgroup)) > MAX_THREADS:
        raise ValueError(f"threadgroup {threadgroup}: expected at most {MAX_THREADS} threads")
    x, y, z = (min(size, limit) for size, limit in zip(threadgroup, grid, strict=True))  # as MLX does
    return x, y, z


def _order(order: Sequence[int] | np.ndarray | None, grid: Dim3, group: Dim3) -> np.ndarray:
    count = int(np.prod([-(-size // part) for size, part in zip(grid, group, strict=True)]))
    sequence = np.arange(count) if order is None else np.asarray(order)
    if not np.array_equal(np.sort(sequence), np.arange(count)):
        raise ValueError(f"order: expected each of 0..{count - 1} once")
    return np.ascontiguousarray(sequence, np.uint32)


def _blank(shape: Sequence[int], dtype: np.dtype | type, init_value: float | None) -> np.ndarray:
    array = np.empty(tuple(shape), dtype)
    if init_value is None:
        array.reshape(-1).view(np.uint8)[:] = UNWRITTEN
    else:
        array[...] = init_value
    return array


def _input(name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """An input, or what MLX passes with one: its shape, strides (in elements) and dimensions."""
    if name in inputs:
        return inputs[name]
    base, _, what = name.rpartition("_")
    if base not in inputs or what not in ("shape", "strides", "ndim"):
        raise ValueError(f"the kernel reads {name}, which is not among the inputs {sorted(inputs)}")
    array = inputs[base]
    if what == "shape":
        return np.array(array.shape or (0,), np.int32)
    if what == "ndim":
        return np.array([array.ndim], np.int32)
    return np.array([s // array.itemsize for s in array.strides] or [0], np.int64)


def _compare(first: Ran, again: Ran) -> None:
    for name, array in first.outputs.items():
        one, other = (ran.outputs[name].reshape(-1).view(np.uint8) for ran in (first, again))
        if not np.array_equal(one, other):
            place = int(np.flatnonzero(one != other)[0]) // array.itemsize
            raise OrderDependent(f"output {name} differs at element {place} when threadgroups run in another order")


@cache
def source_line(library: Path, pc: int) -> int:
    """The printed source's line of an instruction, 0 where no tool can tell."""
    tool = shutil.which("addr2line")
    if tool is None:
        return 0
    ran = subprocess.run([tool, "-i", "-e", str(library), hex(pc - 1)], capture_output=True, text=True)
    for place in ran.stdout.splitlines():
        file, _, line = place.split(" ")[0].rpartition(":")
        if file.endswith(("kernel.cpp", ".metal")) and line.isdigit():
            return int(line)
    return 0
