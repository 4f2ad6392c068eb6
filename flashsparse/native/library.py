"""Finds, loads and checks the native library, and declares its functions' types. Knows nothing of what they do."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from importlib import resources
from typing import Any

from flashsparse.errors import NativeLibraryError

ABI_VERSION = 8
FILE_NAME = "libflashsparse.dylib" if sys.platform == "darwin" else "libflashsparse.so"
REBUILD = "build it with a C++ compiler: pip install --force-reinstall --no-deps . (or -e .) in the source tree"


_process = [os.getpid()]  # kept, since asking takes microseconds on some machines and every native call asks
os.register_at_fork(after_in_child=lambda: _process.__setitem__(0, os.getpid()))


def process() -> int:
    """This process's id; a fork has another."""
    return _process[0]


class CMatrix(ctypes.Structure):
    """fs_matrix."""

    _fields_ = [
        ("data", c_void_p),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("dtype", c_int32),
        ("scale_dtype", c_int32),
        ("group_size", c_int32),
        ("reserved", c_int32),
    ]


class CCompact(ctypes.Structure):
    """fs_compact."""

    _fields_ = [
        ("high", c_void_p),
        ("low", c_void_p),
        ("scales", c_void_p),
        ("errors", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
    ]


class CRecord(ctypes.Structure):
    """fs_record."""

    _fields_ = [
        ("gate", c_int64),
        ("gate_bias", c_int64),
        ("up", c_int64),
        ("up_bias", c_int64),
        ("down", c_int64),
        ("d", c_int64),
        ("dtype", c_int32),
        ("scale_dtype", c_int32),
        ("group_size", c_int32),
        ("activation", c_int32),
        ("param", c_float),
        ("gated", c_int32),
    ]


class CSlots(ctypes.Structure):
    """fs_slots."""

    _fields_ = [
        *((name, c_void_p) for name in ("slot_of", "record_in", "recent", "lasting", "recent_in", "lasting_in")),
        *((name, c_void_p) for name in ("held", "keys", "victims")),
        *((name, c_int64) for name in ("records", "slots", "step", "epoch", "numbers")),
        *((name, c_int64) for name in ("round", "committed", "reservation", "waiting")),
        *((name, c_int64) for name in ("touched", "holding")),
    ]


class CHome(ctypes.Structure):
    """fs_home."""

    _fields_ = [
        *((name, c_void_p) for name in ("slots", "begin", "slab")),
        *((name, c_int64) for name in ("slot_bytes", "record_bytes", "stride", "data_offset")),
        *((name, c_int64) for name in ("sector", "gap", "longest")),
        ("fd", c_int32),
        ("reserved", c_int32),
    ]


class CInput(ctypes.Structure):
    """fs_ffn_input."""

    _fields_ = [
        ("record", c_void_p),
        ("x", c_void_p),
        ("T", c_int64),
        ("I", c_int64),
        ("activated", c_void_p),
        ("mask", c_void_p),
        ("hidden", c_void_p),
        ("width", c_int64),
        ("y", c_void_p),
        ("count_fired", c_int64),
    ]


class CHint(ctypes.Structure):
    """fs_hint."""

    _fields_ = [
        *((name, c_void_p) for name in ("home", "norm", "scoring", "bias", "h", "x", "scores")),
        *((name, c_float) for name in ("least", "param")),
        *((name, c_int32) for name in ("exact", "activation")),
    ]


class CReadError(ctypes.Structure):
    """fs_read_error."""

    _fields_ = [("index", c_int64), ("got", c_int64), ("error", c_int32), ("reserved", c_int32)]


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "fs_abi_version": (c_int32, []),
    "fs_isa": (c_char_p, []),
    "fs_set_isa": (c_int32, [c_char_p]),
    "fs_workers_create": (c_void_p, [c_int32]),
    "fs_workers_stop": (None, [c_void_p]),
    "fs_workers_destroy": (None, [c_void_p]),
    "fs_memory_read": (c_uint64, [c_void_p, c_void_p, c_int64]),
    "fs_touch": (None, [c_void_p, c_int64]),
    "fs_linear": (None, [c_void_p, POINTER(CMatrix), c_void_p, c_void_p, c_int64, c_void_p]),
    "fs_score": (None, [c_void_p, POINTER(CMatrix), c_void_p, c_void_p, c_int64, c_void_p]),
    "fs_gather": (None, [POINTER(CMatrix), c_void_p, c_int64, c_void_p]),
    "fs_attention": (None, [c_void_p] * 4 + [c_int32] + [c_int64] * 7 + [c_float, c_void_p]),
    "fs_kv_append": (None, [c_void_p, c_void_p, c_int32] + [c_int64] * 5),
    "fs_activate": (None, [c_void_p, c_int64, c_int32, c_float]),
    "fs_active": (c_int64, [c_void_p, c_int64, c_int64, c_void_p]),
    "fs_select": (c_int64, [c_void_p, c_int64, c_int64, c_float, c_void_p, c_void_p]),
    "fs_select_topk": (c_int64, [c_void_p, c_int64, c_int64, c_int64, c_float, c_void_p, c_void_p]),
    "fs_candidates": (
        c_int64,
        [c_void_p, POINTER(CCompact), c_void_p, c_int64, c_int32, c_float, c_void_p, c_void_p, POINTER(c_int64)],
    ),
    "fs_ffn_hidden": (
        None,
        [c_void_p, POINTER(CRecord)]
        + [c_void_p] * 4
        + [c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64],
    ),
    "fs_ffn_down": (
        None,
        [c_void_p, POINTER(CRecord)] + [c_void_p] * 3 + [c_int64, c_void_p, c_int64, c_int64, c_void_p],
    ),
    "fs_attend": (None, [c_void_p] * 4 + [c_int64, c_int64, c_void_p, c_int64] + [c_void_p] * 3),
    "fs_normalize": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p]),
    "fs_turns": (None, [c_void_p, c_int64, c_double, c_int64, c_int64, c_void_p]),
    "fs_compute_ns": (c_int64, []),
    "fs_pool_create": (c_void_p, [c_int32, c_int64]),
    "fs_pool_stop": (None, [c_void_p]),
    "fs_pool_destroy": (None, [c_void_p]),
    "fs_read_rate": (
        c_int64,
        [c_int32, c_void_p, c_int64, c_int64, c_int32, c_int64, c_void_p, POINTER(c_int64 * 2)],
    ),
    "fs_plan_reads": (c_int64, [c_void_p, c_int64, c_int64, c_int64, c_void_p, POINTER(c_int64)]),
    "fs_pool_submit": (c_int64, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int32]),
    "fs_pool_take": (c_int64, [c_void_p, c_int64, c_void_p, c_int64, c_int64]),
    "fs_pool_error": (c_int32, [c_void_p, c_int64, POINTER(CReadError)]),
    "fs_pool_keep": (None, [c_void_p, c_int64, c_void_p]),
    "fs_pool_release": (None, [c_void_p, c_int64]),
    "fs_pool_pause": (c_int64, [c_void_p]),
    "fs_pool_resume": (None, [c_void_p]),
    "fs_slots_valid": (c_int32, [c_void_p, c_void_p, c_int64]),
    "fs_slots_fits": (c_int32, [c_void_p, c_void_p, c_int64]),
    "fs_slots_recover": (None, [c_void_p, c_int64]),
    "fs_slots_begin": (c_int64, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p]),
    "fs_slots_commit": (c_int32, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p]),
    "fs_slots_abort": (None, [c_void_p, c_int64]),
    "fs_slots_close": (None, [c_void_p, c_int64]),
    "fs_slots_reserve": (c_int64, [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p]),
    "fs_slots_settle": (None, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int32]),
    "fs_slots_end_step": (None, [c_void_p]),
    "fs_rounds_create": (c_void_p, [c_void_p, c_void_p]),
    "fs_rounds_destroy": (None, [c_void_p, c_int32]),
    "fs_rounds_run": (c_int32, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p]),
    "fs_rounds_ahead": (c_int32, [c_void_p, c_void_p, c_void_p, c_float, c_void_p]),
    "fs_rounds_drop": (None, [c_void_p, c_void_p]),
    "fs_step_run": (c_int32, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p]),
    "fs_pool_counters": (None, [c_void_p, POINTER(c_int64 * 5)]),
}


@functools.cache
def lib() -> ctypes.CDLL:
    """The loaded library, with argument types set. Raises NativeLibraryError, which says how to build it."""
    path = resources.files("flashsparse.native") / FILE_NAME
    if not path.is_file():
        raise NativeLibraryError(f"{path} is missing; {REBUILD}")
    try:
        library = ctypes.CDLL(str(path))
        found = library.fs_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path} cannot be loaded: {error}; {REBUILD}") from None
    if found != ABI_VERSION:
        raise NativeLibraryError(f"{path} has interface version {found}, expected {ABI_VERSION}; {REBUILD}")
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def isa() -> str:
    """The instruction set the kernels use: "avx512", "avx2" or "portable"."""
    return lib().fs_isa().decode()


def set_isa(name: str) -> None:
    """Choose the kernels' variant, for tests. Raises ValueError when this machine or build lacks it."""
    if lib().fs_set_isa(name.encode()):
        raise ValueError(f"instruction set {name!r} is not available here; in use is {isa()!r}")
