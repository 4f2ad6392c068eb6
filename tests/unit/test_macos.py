"""macOS's calls, with stand-ins for the system: arguments as Apple's headers have them, and what failure does."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from flashsparse import macos, memory
from flashsparse.cli.report import stats_line
from flashsparse.errors import FlashSparseError, UsageError
from flashsparse.flash.file import FlashFile
from flashsparse.stats import Stats


def stand_in(monkeypatch: pytest.MonkeyPatch, **calls: Any) -> None:
    monkeypatch.setattr(macos, "library", lambda: SimpleNamespace(task=ctypes.c_uint32(7), **calls))


def target(reference: Any) -> Any:
    """What ctypes.byref refers to."""
    return reference._obj


# --- reading ----------------------------------------------------------------------------------------------------------


def test_direct_descriptors_are_not_cached(tmp_path: Path) -> None:
    path, calls = tmp_path / "a", []
    path.write_bytes(b"x" * 100)
    fd = macos.open_direct(str(path), lambda *call: calls.append(call))
    assert calls == [(fd, 48, 1)] and os.read(fd, 3) == b"xxx"
    os.close(fd)


def test_a_refusal_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    seen = []

    def refuse(fd: int, *rest: Any) -> None:
        seen.append(fd)
        raise OSError(45, "not supported")

    with pytest.raises(OSError, match="not supported"):
        macos.open_direct(str(path), refuse)
    with pytest.raises(OSError):
        os.fstat(seen[0])


def test_files_open_direct_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "a", []
    path.write_bytes(b"x" * 100)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macos, "_fcntl", lambda: lambda *call: calls.append(call))
    with FlashFile(path) as file:
        assert file.direct and file.sector == 4096 and calls == [(file.fd, 48, 1)]


def test_announced_stretches_are_cut_to_what_the_call_can_say() -> None:
    calls: list[tuple[int, int, bytes]] = []
    assert macos.announce(5, 1 << 40, 5 << 30, lambda *call: calls.append(call))
    parts = [struct.unpack("=qi", data[:12]) for _, _, data in calls]
    assert {(fd, what, len(data)) for fd, what, data in calls} == {(5, 44, 16)}
    assert parts[0] == (1 << 40, 2**31 - 1) and sum(count for _, count in parts) == 5 << 30
    assert all(at + count == after for (at, count), (after, _) in itertools.pairwise(parts))


def test_announcing_is_never_an_error() -> None:
    def refuse(*call: Any) -> None:
        raise OSError(45, "not supported")

    assert macos.announce(5, 0, 10, refuse) is False


# --- memory -----------------------------------------------------------------------------------------------------------


def test_footprint_is_task_infos(monkeypatch: pytest.MonkeyPatch) -> None:
    def task_info(task: Any, flavor: Any, info: Any, count: Any) -> int:
        assert (task.value, flavor.value, target(count).value) == (7, 22, 38)
        raw = (ctypes.c_uint64 * 19).from_buffer(target(info))
        raw[18] = 6_000_000_001  # two words of sizes and counts, then 16 sizes
        return 0

    stand_in(monkeypatch, task_info=task_info)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert macos.footprint() == memory.footprint() == 6_000_000_001


def test_footprint_that_is_refused_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(task: Any, flavor: Any, info: Any, count: Any) -> int:
        target(count).value = 36
        return 0

    for call in (lambda *call: 5, short):
        stand_in(monkeypatch, task_info=call)
        with pytest.raises(FlashSparseError, match="task_info"):
            macos.footprint()


def test_peak_footprint_is_rusages(monkeypatch: pytest.MonkeyPatch) -> None:
    def proc_pid_rusage(pid: int, flavor: int, buffer: Any) -> int:
        assert (pid, flavor) == (os.getpid(), 4)
        # Where <sys/resource.h> puts it: a 16-byte uuid, then counter 28 of 35.
        (ctypes.c_uint64 * 37).from_buffer(target(buffer))[2 + 28] = 2222
        return 0

    assert ctypes.sizeof(macos._RusageInfoV4) == 296
    stand_in(monkeypatch, proc_pid_rusage=proc_pid_rusage)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_footprint() == 2222
    stand_in(monkeypatch, proc_pid_rusage=lambda *call: -1)
    with pytest.raises(FlashSparseError, match="proc_pid_rusage"):
        memory.peak_footprint()


def test_wired_memory_stays_below_the_systems_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mx, "metal", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000}, raising=False)
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    assert (macos.wire(400), macos.wire(4000), limits) == (400, 1000, [400, 1000])
    with pytest.raises(UsageError, match="-1 bytes"):
        macos.wire(-1)
    monkeypatch.setattr(mx, "metal", SimpleNamespace(is_available=lambda: False))
    assert macos.wire(400) == 0 and len(limits) == 2


# --- the moment -------------------------------------------------------------------------------------------------------


def sysctl(level: int) -> Any:
    def sysctlbyname(name: bytes, value: Any, size: Any, new: None, new_size: Any) -> int:
        assert name == b"kern.memorystatus_vm_pressure_level" and target(size).value == 4
        target(value).value = level
        return 0

    return sysctlbyname


@pytest.mark.parametrize(("level", "name"), [(1, "normal"), (2, "warning"), (4, "critical"), (3, None)])
def test_pressure(level: int, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, sysctlbyname=sysctl(level))
    assert macos.pressure() == name
    stand_in(monkeypatch, sysctlbyname=lambda *call: -1)
    assert macos.pressure() is None


@pytest.mark.parametrize(("level", "name"), [(0, "nominal"), (2, "heavy"), (9, None)])
def test_heat(level: int, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = []

    def notify_get_state(token: Any, state: Any) -> int:
        target(state).value = level
        return 0

    calls = {"notify_register_check": lambda *call: 0, "notify_cancel": cancelled.append}
    stand_in(monkeypatch, notify_get_state=notify_get_state, **calls)
    assert macos.heat() == name and len(cancelled) == 1
    stand_in(monkeypatch, notify_get_state=notify_get_state, **(calls | {"notify_register_check": lambda *call: 1}))
    assert macos.heat() is None


def test_figures_say_what_slows_a_mac_down() -> None:
    stats = Stats("exact", "direct", "metal", 1.0, 10, 5, lookahead=lambda: {"on": False})
    stats.system = lambda: {"pressure": "warning", "heat": "heavy", "napping": True}
    line = stats_line(stats.to_dict())
    assert line.endswith("memory pressure warning | heat heavy | held back by the system (App Nap or background)")
    stats.system = lambda: {"pressure": "normal", "heat": "nominal", "napping": None}
    assert stats_line(stats.to_dict()).endswith("memory pressure normal | heat nominal")
    stats.system = dict
    assert "pressure" not in stats_line(stats.to_dict())


@pytest.mark.parametrize(("priority", "active", "failed", "answer"), [
    (0, 0, 0, False), (0, 1, 0, True), (0x1000, 0, 0, True), (0, 0, 4, None),
])  # fmt: skip
def test_napping(priority: int, active: int, failed: int, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def task_policy_get(task: Any, flavor: int, info: Any, count: Any, default: Any) -> int:
        assert (flavor, target(count).value) == (3, 16)
        target(info)[0] = active
        return failed

    stand_in(monkeypatch, getpriority=lambda which, who: priority, task_policy_get=task_policy_get)
    assert macos.napping() is answer


def test_other_systems_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert macos.state() == {}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macos, "pressure", lambda: "normal")
    monkeypatch.setattr(macos, "heat", lambda: None)
    monkeypatch.setattr(macos, "napping", lambda: False)
    assert macos.state() == {"pressure": "normal", "heat": None, "napping": False}


def test_under_pressure_freed_buffers_go_and_the_limit_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, cleared, now, level = [1000], [], [0.0], ["normal"]

    def set_cache_limit(value: int) -> int:
        limit.append(value)
        return limit[-2]

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mx, "set_cache_limit", set_cache_limit)
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(now[0]))
    held: list[bool] = []
    relief = macos.Relief(held.append)
    for at, said in ((0.0, "normal"), (0.5, "critical"), (1.0, "critical"), (2.5, "warning"), (4.0, "normal")):
        now[0], level[0] = at, said
        relief.step(lambda: level[0], lambda: now[0])
    assert (cleared, relief.times, limit, held) == ([1.0], 1, [1000, 0, 1000], [True, False])
    now[0], level[0] = 6.0, "warning"
    relief.step(lambda: level[0], lambda: now[0])
    relief.close()
    assert limit == [1000, 0, 1000, 0, 1000] and held == [True, False, True, False]


# What Watch takes from libdispatch; `tell` is a notification, on a thread that Python does not know.
DISPATCH = """
#include <pthread.h>
#include <stdlib.h>
typedef void (*function)(void*);
typedef struct { function handler; unsigned long level; int resumed, cancelled; } source;
char _dispatch_source_type_memorypressure;
source* made;
int alive, refuse;
void* dispatch_queue_create(const char* label, void* attributes) { alive++; return malloc(1); }
void* dispatch_source_create(void* type, unsigned long handle, unsigned long mask, void* queue) {
  if (refuse || type != &_dispatch_source_type_memorypressure || handle || mask != 7 || !queue) return 0;
  alive++;
  return made = calloc(1, sizeof(source));
}
void dispatch_source_set_event_handler_f(source* s, function handler) { s->handler = handler; }
unsigned long dispatch_source_get_data(source* s) { return s->level; }
void dispatch_resume(source* s) { s->resumed = 1; }
void dispatch_source_cancel(source* s) { s->cancelled = 1; }
void dispatch_sync_f(void* queue, void* context, function work) { work(context); }
void dispatch_release(void* object) { alive--; }
static void* run(void* s) { ((source*)s)->handler(0); return 0; }
void tell(unsigned long level) {
  pthread_t thread;
  made->level = level;
  if (!made->resumed || made->cancelled) return;
  pthread_create(&thread, 0, run, made);
  pthread_join(thread, 0);
}
"""


@pytest.fixture
def dispatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "dispatch.c").write_text(DISPATCH)
    built = [compiler, "-shared", "-fPIC", "-o", "dispatch.so", "dispatch.c", "-lpthread"]
    subprocess.run(built, cwd=tmp_path, check=True)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(macos, "library", lambda: ctypes.CDLL(str(tmp_path / "dispatch.so")))
    monkeypatch.setattr(macos, "pressure", lambda: "normal")
    return macos.library()


def alive(dispatch: Any) -> int:
    return ctypes.c_int.in_dll(dispatch, "alive").value


def test_the_system_notifies_of_pressure(dispatch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, held = [1000], []
    monkeypatch.setattr(mx, "set_cache_limit", lambda value: limits.append(value) or limits[-2])
    relief = macos.Relief(held.append, every=3600)
    relief.open()
    assert relief.watch is not None and relief.watch.level == "normal" and alive(dispatch) == 2
    for level, expected in ((2, [True]), (4, [True]), (1, [True, False])):
        dispatch.tell(level)
        relief.step()
        assert held == expected
    monkeypatch.setattr(macos, "pressure", lambda: "critical")
    dispatch.tell(3)  # both warning and normal: which came last is asked
    assert relief.watch.level == "critical"
    dispatch.tell(2)
    relief.step()
    watch = relief.watch
    relief.close()
    relief.close()
    dispatch.tell(4)
    assert alive(dispatch) == 0 and watch.level == "warning" and limits == [1000, 0, 1000, 0, 1000]


def test_a_watch_that_is_let_go_ends(dispatch: Any) -> None:
    watch = macos.Watch()
    assert alive(dispatch) == 2
    del watch
    assert alive(dispatch) == 0


def test_without_notifications_the_system_is_asked(dispatch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ctypes.c_int.in_dll(dispatch, "refuse").value = 1
    relief, held = macos.Relief(), []
    relief.hold = held.append
    relief.open()
    assert relief.watch is None and alive(dispatch) == 0
    monkeypatch.setattr(macos, "pressure", lambda: "critical")
    relief.step()
    relief.close()
    assert held == [True, False]
    monkeypatch.setattr(macos, "library", lambda: ctypes.CDLL(None))  # has none of it
    with pytest.raises(FlashSparseError, match="no notifications"):
        macos.Watch()
