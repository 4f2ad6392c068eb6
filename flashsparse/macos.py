"""What is macOS's alone: reads past the page cache, the process's footprint, wired memory, pressure, heat and App Nap.

Every call into the system goes through `library` or takes the call as an argument, so that tests on any machine stand
in for it. Written from Apple's headers; none of it has been run on a Mac. MLX is imported by `wire` and `Relief` only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashsparse.errors import FlashSparseError, UsageError

PAGE_BYTES = 16384  # of Apple silicon; a multiple of every sector size
MOST_READ_BYTES = 2**31 - 1  # pread refuses more with EINVAL; the native reader asks for 1 GiB at most
F_RDADVISE, F_NOCACHE = 44, 48  # <sys/fcntl.h>

LEVELS = {1: "normal", 2: "warning", 4: "critical"}  # DISPATCH_MEMORYPRESSURE_*
HEAT = (
    "nominal",
    "moderate",
    "heavy",
    "trapping",
    "sleeping",
)  # OSThermalPressureLevel of <libkern/OSThermalNotification.h>
Control = Callable[[int, int, Any], Any]  # fcntl.fcntl


def here() -> bool:
    return sys.platform == "darwin"


def library() -> Any:
    """The system's C library."""
    return ctypes.CDLL("/usr/lib/libSystem.B.dylib", use_errno=True)


def _fcntl() -> Control:
    import fcntl

    return fcntl.fcntl


# --- reading ----------------------------------------------------------------------------------------------------------


def open_direct(path: str, control: Control | None = None) -> int:
    """A descriptor whose reads bypass the page cache. Raises OSError.

    Reads that are not aligned to PAGE_BYTES still work but may be cached; what is cached already is read from there.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        (control or _fcntl())(fd, F_NOCACHE, 1)
    except BaseException:
        os.close(fd)
        raise
    return fd


def announce(fd: int, offset: int, length: int, control: Control | None = None) -> bool:
    """Ask the system to begin reading a stretch into the page cache; for cached reads only. False where it refuses."""
    ok = True
    for start in range(offset, offset + length, MOST_READ_BYTES):
        count = min(MOST_READ_BYTES, offset + length - start)
        try:
            (control or _fcntl())(fd, F_RDADVISE, struct.pack("=qi4x", start, count))  # struct radvisory
        except OSError:
            ok = False
    return ok


# --- memory -----------------------------------------------------------------------------------------------------------

_TASK_VM_INFO, _VM_INFO_WORDS, _FOOTPRINT_AT = 22, 38, 144  # <mach/task_info.h>: up to phys_footprint, in 32-bit words
_RUSAGE_INFO_V4 = 4


class _RusageInfoV4(ctypes.Structure):
    """struct rusage_info_v4 of <sys/resource.h>: a uuid, then 35 counters, of which one matters here."""

    _fields_ = (
        ("ri_uuid", ctypes.c_uint8 * 16),
        ("ri_user_time_to_proc_exit_abstime", ctypes.c_uint64 * 28),
        ("ri_lifetime_max_phys_footprint", ctypes.c_uint64),
        ("ri_instructions_to_runnable_time", ctypes.c_uint64 * 6),
    )


def footprint() -> int:
    """The process's physical footprint in bytes, what Activity Monitor shows as Memory. Raises FlashSparseError."""
    system = library()
    info, count = (ctypes.c_uint32 * _VM_INFO_WORDS)(), ctypes.c_uint32(_VM_INFO_WORDS)
    task = ctypes.c_uint32.in_dll(system, "mach_task_self_") if isinstance(system, ctypes.CDLL) else system.task
    failed = system.task_info(task, ctypes.c_int(_TASK_VM_INFO), ctypes.byref(info), ctypes.byref(count))
    if failed or count.value < _VM_INFO_WORDS:
        raise FlashSparseError(f"task_info failed with {failed}: the footprint is unknown")
    return int.from_bytes(bytes(info)[_FOOTPRINT_AT : _FOOTPRINT_AT + 8], "little")


def peak_footprint() -> int:
    """The highest footprint since the process began; it cannot be reset. Raises FlashSparseError."""
    usage = _RusageInfoV4()
    if library().proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(usage)) != 0:
        raise FlashSparseError(f"proc_pid_rusage failed with errno {ctypes.get_errno()}: the peak footprint is unknown")
    return int(usage.ri_lifetime_max_phys_footprint)


def wire(nbytes: int) -> int:
    """Keep up to `nbytes` of what the GPU uses in memory; returns what is allowed. 0 where there is no Metal.

    The system's own limit for one process (iogpu.wired_limit_mb) holds: more than that is cut, not an error.
    """
    if nbytes < 0:
        raise UsageError(f"a wired limit of {nbytes} bytes: expected 0 or more")
    if not here():
        return 0
    import mlx.core as mx

    if not mx.metal.is_available():
        return 0
    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    allowed = min(nbytes, int(info["max_recommended_working_set_size"]))
    mx.set_wired_limit(allowed)
    return allowed


# --- what the system says of the moment -------------------------------------------------------------------------------


def _sysctl(name: str) -> int | None:
    value, size = ctypes.c_int32(), ctypes.c_size_t(4)
    failed = library().sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else value.value


def pressure() -> str | None:
    """The system's memory pressure, of LEVELS; None where it does not say."""
    return LEVELS.get(_sysctl("kern.memorystatus_vm_pressure_level") or 0)


def heat() -> str | None:
    """The machine's thermal pressure, of HEAT, by notify(3); None where it does not say."""
    system, token, state = library(), ctypes.c_int(), ctypes.c_uint64()
    if system.notify_register_check(b"com.apple.system.thermalpressurelevel", ctypes.byref(token)):
        return None
    failed = system.notify_get_state(token, ctypes.byref(state))
    system.notify_cancel(token)
    return None if failed or state.value >= len(HEAT) else HEAT[state.value]


_PRIO_DARWIN_PROCESS, _PRIO_DARWIN_BG = 4, 0x1000  # <sys/resource.h>
_TASK_SUPPRESSION_POLICY, _SUPPRESSION_WORDS = 3, 16  # task_suppression_policy: `active` comes first


def napping() -> bool | None:
    """Whether the system holds this process back: App Nap, or background priority. None where it does not say."""
    system = library()
    if system.getpriority(_PRIO_DARWIN_PROCESS, 0) == _PRIO_DARWIN_BG:
        return True
    info, count = (ctypes.c_int32 * _SUPPRESSION_WORDS)(), ctypes.c_uint32(_SUPPRESSION_WORDS)
    default = ctypes.c_int(0)
    task = ctypes.c_uint32.in_dll(system, "mach_task_self_") if isinstance(system, ctypes.CDLL) else system.task
    failed = system.task_policy_get(
        task, _TASK_SUPPRESSION_POLICY, ctypes.byref(info), ctypes.byref(count), ctypes.byref(default)
    )
    return None if failed else bool(info[0])


def state() -> dict[str, str | bool | None]:
    """`pressure`, `heat` and `napping` for `--stats`; nothing on other systems."""
    return {"pressure": pressure(), "heat": heat(), "napping": napping()} if here() else {}


_EVERY_LEVEL = 0x01 | 0x02 | 0x04  # DISPATCH_MEMORYPRESSURE_NORMAL, _WARN, _CRITICAL of <dispatch/source.h>
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # dispatch_function_t


class Watch:
    """The system's notifications of memory pressure, from a dispatch source (libdispatch) until `close`.

    They come on a thread of the system's, which notes the level and does nothing else. Raises FlashSparseError where
    there are none.
    """

    def __init__(self) -> None:
        system = library()
        try:
            kind = ctypes.addressof(ctypes.c_char.in_dll(system, "_dispatch_source_type_memorypressure"))
            calls = {name: _typed(system, name, *types) for name, types in _DISPATCH.items()}
        except (AttributeError, ValueError) as error:
            raise FlashSparseError(f"no notifications of memory pressure: {error}") from error
        self._start(calls, kind)

    def _start(self, calls: dict[str, Callable[..., Any]], kind: int) -> None:
        self._seen = seen = [pressure()]  # a source tells changes only
        queue = calls["dispatch_queue_create"](b"flashsparse.pressure", None)
        source = calls["dispatch_source_create"](kind, 0, _EVERY_LEVEL, queue)
        if not source:
            calls["dispatch_release"](queue)
            raise FlashSparseError("no notifications of memory pressure: dispatch_source_create gave none")

        def note(context: int | None) -> None:
            told = calls["dispatch_source_get_data"](source)  # several levels at once, if it ran late
            seen[0] = LEVELS.get(told) or pressure()

        handler = _HANDLER(note)
        calls["dispatch_source_set_event_handler_f"](source, handler)
        calls["dispatch_resume"](source)
        self.close = weakref.finalize(self, _end_watch, calls, source, queue, handler, os.getpid())

    @property
    def level(self) -> str | None:
        """The last one told, of LEVELS."""
        return self._seen[0]


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_size_t
_DISPATCH: dict[str, tuple[Any, ...]] = {  # <dispatch/source.h>, queue.h and object.h: result, arguments
    "dispatch_queue_create": (_POINTER, ctypes.c_char_p, _POINTER),
    "dispatch_source_create": (_POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER),
    "dispatch_source_set_event_handler_f": (None, _POINTER, _HANDLER),
    "dispatch_source_get_data": (_NUMBER, _POINTER),
    "dispatch_resume": (None, _POINTER),
    "dispatch_source_cancel": (None, _POINTER),
    "dispatch_sync_f": (None, _POINTER, _POINTER, _HANDLER),
    "dispatch_release": (None, _POINTER),
}


def _typed(system: Any, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    call: Any = getattr(system, name)
    call.restype, call.argtypes = result, arguments
    return call


def _end_watch(calls: dict[str, Callable[..., Any]], source: int, queue: int, handler: Any, owner: int) -> None:
    """Afterwards `handler`, which lives until then, does not run. A forked child leaves alone what is its parent's."""
    if os.getpid() != owner:
        return
    calls["dispatch_source_cancel"](source)
    calls["dispatch_sync_f"](queue, None, _HANDLER(lambda context: None))  # behind a handler that is running
    calls["dispatch_release"](source)
    calls["dispatch_release"](queue)


@dataclass
class Relief:
    """Stops growing under memory pressure, and drops nothing that is in use.

    MLX's cache of freed buffers goes, and `hold` is called with True, so that slots that were never filled stay empty;
    with False when the pressure ends. Asked once a step. The system notifies (`Watch`) from `open` to `close`; where it
    does not, it is asked every `every` seconds. `times`: how often pressure began.
    """

    hold: Callable[[bool], None] = lambda on: None
    every: float = 1.0
    times: int = 0
    watch: Watch | None = None
    _next: float = 0.0
    _limit: int | None = None  # MLX's own limit, while ours holds

    def open(self) -> None:
        if here() and self.watch is None:
            with contextlib.suppress(FlashSparseError):
                self.watch = Watch()

    def close(self) -> None:
        watch, self.watch = self.watch, None
        if watch is not None:
            watch.close()
        self._end()

    def step(self, level: Callable[[], str | None] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        if not here():
            return
        if self.watch is None and clock() < self._next:
            return
        self._next = clock() + self.every
        found = level() if level is not None else self.watch.level if self.watch is not None else pressure()
        if found in ("warning", "critical"):
            self._begin()
        else:
            self._end()

    def _begin(self) -> None:
        if self._limit is not None:
            return
        import mlx.core as mx

        self._limit = mx.set_cache_limit(0)
        mx.clear_cache()
        self.hold(True)
        self.times += 1

    def _end(self) -> None:
        if self._limit is None:
            return
        import mlx.core as mx

        mx.set_cache_limit(self._limit)
        self._limit = None
        self.hold(False)
