"""Kills conversions at every step, in forked children, and checks what is left. Run by test_convert_resume.

Usage: python -m tests.model.convert_kills WORK BITS SCENARIO; prints the number of kills as its last line.
A step is a system call that changes the disk (write, fsync, rename, mkdir, unlink, rmdir, truncate); a write is also
killed half way. Imports MLX only in children: a process that runs MLX must not fork.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import converter.publish as publish
from converter.convert import convert
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.verify import verify
from tests.checkpoints import write_checkpoint

CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "truncate")


class Killer:
    """Kills the process at step `last`, counted from 1; 0 never. A write is killed after half of its bytes."""

    def __init__(self, last: int) -> None:
        self.count, self.last = 0, last
        for name in CALLS:
            setattr(os, name, self.counted(getattr(os, name), half=name == "write"))
        swap = publish.swap
        publish.swap = lambda new, old: self.step() or swap(new, old)

    def step(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, call: Callable[..., Any], half: bool) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if half and self.count + 1 == self.last:
                call(args[0], memoryview(args[1])[: len(args[1]) // 2])
            self.step()
            return call(*args, **options)

        return run


def in_child(work: Callable[[], object]) -> int:
    """Runs `work` in a forked child: its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check_same(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    assert filecmp.cmpfiles(found, expected, names, shallow=False)[1:] == ([], [])


def check_destination(dst: Path, new: Path, old: Path | None, swaps: bool) -> None:
    """After a kill the destination is the old pack or the new one, whole; never half of either."""
    if not dst.exists():
        assert old is None or not swaps
        return
    digest = Manifest.load(dst).digest
    assert digest in {Manifest.load(pack).digest for pack in (new, old) if pack is not None}
    assert verify(dst) == []


class Scenario:
    """One conversion that is killed again and again; `old` is a pack that it replaces."""

    def __init__(self, work: Path, bits: int, name: str) -> None:
        self.work, self.name = work, name
        self.dst = work / "pack"
        self.source = write_checkpoint(work / "source", dtype="F16", shards=2, intermediate=32, vocab=16)
        (self.source / "tokenizer.json").write_text("{}")
        other = write_checkpoint(work / "other", dtype="F16", seed=1, intermediate=32, vocab=16)
        self.options: dict[str, Any] = {"bits": bits, "group_size": 32}
        if name == "zstd":
            self.options["codec"] = name
        replaces = name not in ("new", "zstd")
        assert in_child(lambda: convert(self.source, work / "expected", **self.options)) == 0
        if replaces:
            assert in_child(lambda: convert(other, work / "old", **self.options)) == 0
        self.expected, self.old = work / "expected", work / "old" if replaces else None
        self.force = replaces

    def reset(self) -> None:
        shutil.rmtree(self.dst, ignore_errors=True)
        shutil.rmtree(self.dst.with_name(".pack.partial"), ignore_errors=True)
        if self.old:
            shutil.copytree(self.old, self.dst)

    def run(self, last: int) -> None:
        if self.name == "no-swap":
            publish.swap = lambda new, old: False
        killer = Killer(last)
        convert(self.source, self.dst, force=self.force, resume=True, **self.options)
        (self.work / "steps").write_text(str(killer.count))

    def kill_and_resume(self, last: int) -> None:
        self.reset()
        assert in_child(lambda: self.run(last)) == -signal.SIGKILL, last
        check_destination(self.dst, self.expected, self.old, self.name != "no-swap")
        # Every third is killed a second time, in the middle of what is left.
        if last % 3 == 0:
            in_child(lambda: self.run(last // 2 + 1))
        again = {"resume": True, "force": self.force, **self.options}
        assert in_child(lambda: convert(self.source, self.dst, **again)) == 0, last
        check_same(self.dst, self.expected)
        assert not self.dst.with_name(".pack.partial").exists(), last


def main() -> None:
    work, bits, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    scenario = Scenario(work, bits, name)
    scenario.reset()
    assert in_child(lambda: scenario.run(0)) == 0
    check_same(scenario.dst, scenario.expected)
    steps = int((work / "steps").read_text())
    # Without an exchange only the end differs; quantizing children start slowly, and their steps are the same.
    first = steps - 25 if name == "no-swap" else 1
    chosen = range(first, steps + 1, 1 if bits == 16 else 6)
    for last in chosen:
        scenario.kill_and_resume(last)
    print(len(chosen))


if __name__ == "__main__":
    main()
