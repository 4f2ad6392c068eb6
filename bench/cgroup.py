"""Run a command under a real memory limit: a Linux control group (version 1 or 2) that exists for this one run.

Needs the right to make control groups (usually root). Page cache that the command fills counts against the limit too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class NoControlGroup(RuntimeError):
    """This machine or user cannot set a memory limit with a control group."""


@dataclass(frozen=True)
class Limited:
    """What a limited run gave: exit code (-9: killed for memory), standard output, peak bytes of the group, and
    standard error where it was kept."""

    returncode: int
    stdout: str
    peak_bytes: int
    stderr: str = ""


def run_limited(command: Sequence[str], limit_bytes: int, echo: bool = True, quiet: bool = False) -> Limited:
    """Run `command` with `limit_bytes` of memory; `quiet` keeps its standard error instead of showing it.

    Raises NoControlGroup when no limit can be set.
    """
    v1 = V1.is_dir()
    group = (V1 if v1 else V2) / f"flashsparse-{uuid.uuid4().hex[:8]}"
    limit, peak = ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if v1 else ("memory.max", "memory.peak")
    try:
        group.mkdir()
        (group / limit).write_text(str(limit_bytes))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        raise NoControlGroup(f"{group}: {error}; run as root on Linux with the memory controller mounted") from error
    try:
        code, out, errors = _run(command, group / "cgroup.procs", echo, quiet)
        used = int((group / peak).read_text()) if (group / peak).exists() else 0
        return Limited(code, out, used, errors)
    finally:
        group.rmdir()


def _run(command: Sequence[str], procs: Path, echo: bool, quiet: bool) -> tuple[int, str, str]:
    def enter() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a benchmark that is killed leaves nobody behind
        procs.write_text(str(os.getpid()))

    lines = []
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        kept = errors if quiet else None
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=kept, text=True, preexec_fn=enter) as child:
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line)
                if echo:
                    sys.stdout.write(line)
                    sys.stdout.flush()
        errors.seek(0)
        return child.returncode, "".join(lines), errors.read()
