"""What a figure was measured on, and where figures are kept: one CSV per machine, a log for what did not work.

Knows the operating system, git and files; nothing of models. Page cache and other processes' load are here too, since
both spoil a figure that does not mention them.
"""

from __future__ import annotations

import csv
import ctypes
import ctypes.util
import datetime
import json
import mmap
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashsparse import native
from flashsparse.selftest.machine import versions

RESULTS = Path(__file__).with_name("results")
FIELDS = (
    "date", "commit", "benchmark", "subject", "conditions", "metric", "mean", "deviation", "runs", "others_cpu",
    "versions", "command",
)  # fmt: skip
PACKAGES = ("flashsparse", "mlx", "mlx-lm", "numpy", "llama-cpp-python", "transformers", "accelerate", "torch")


def machine() -> dict[str, Any]:
    """Processor, the kernels' instruction set, cores, memory (bytes), system and Python of this machine."""
    return {
        "processor": _processor(),
        "isa": native.isa(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def machine_name() -> str:
    """A short name for files: processor, instruction set, cores and memory."""
    found = machine()  # virtual machines call processors of several generations by one name
    text = f"{found['processor']}-{found['isa']}-{found['cores']}core-{round(found['memory'] / 1e9)}gb"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the source tree, with `+` when files differ from it; "unknown" outside a repository."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else "unknown"


def command_line() -> str:
    """The running program as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"
    return shlex.join([*start.split(), *sys.argv[1:]])


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def shown(values: Sequence[float], digits: int = 2) -> str:
    """`mean ± deviation`, the deviation only when there are several values."""
    mean, deviation = mean_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def record(
    benchmark: str,
    subject: str,
    conditions: dict[str, Any],
    metrics: dict[str, Sequence[float]],
    others_cpu: float | None = None,
    found_versions: dict[str, str] | None = None,
    directory: Path = RESULTS,
) -> Path:
    """Append one row per metric to this machine's CSV, which begins with the machine in a comment."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{machine_name()}.csv"
    new = not path.exists()
    with open(path, "a", newline="") as file:
        if new:
            file.write(f"# {json.dumps(machine())}\n")
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        for name, values in metrics.items():
            mean, deviation = mean_deviation(values)
            writer.writerow(
                {
                    "date": datetime.date.today().isoformat(), "commit": commit(), "benchmark": benchmark,
                    "subject": subject, "conditions": json.dumps(conditions), "metric": name, "mean": f"{mean:.6g}",
                    "deviation": f"{deviation:.3g}", "runs": len(values),
                    "others_cpu": "" if others_cpu is None else f"{others_cpu:.2f}",
                    "versions": json.dumps(versions(PACKAGES) if found_versions is None else found_versions),
                    "command": command_line(),
                }
            )  # fmt: skip
    return path


def note(what: str, why: str, directory: Path = RESULTS) -> None:
    """Append to the log what gave no figure, or one that was not kept, and the reason."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "LOG.md", "a") as file:
        file.write(f"- {datetime.date.today().isoformat()} `{commit()}` {machine_name()}: {what}: {why}\n")


class OthersCpu:
    """Cores that other processes kept busy, on average, while the `with` block ran; `share` is None off Linux."""

    def __enter__(self) -> OthersCpu:
        self.share: float | None = None
        self._began = _busy_and_wall()
        return self

    def __exit__(self, *exc: object) -> None:
        ended = _busy_and_wall()
        if self._began is not None and ended is not None and ended[2] > self._began[2]:
            busy, own, wall = (after - before for before, after in zip(self._began, ended, strict=True))
            self.share = max(0.0, (busy - own) / wall)


def _busy_and_wall() -> tuple[float, float, float] | None:
    """Seconds of all processors, of this process with the children it has waited for, and of the clock."""
    try:
        user, nice, system = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]
    except OSError:
        return None
    times = os.times()  # user, system, and the children's of each
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK"), sum(times[:4]), times.elapsed


def cached_share(paths: Iterable[Path]) -> float | None:
    """The share of the files' pages that the page cache holds; None where mincore is not to be had."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if not hasattr(libc, "mincore"):
        return None
    held = pages = 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            count = -(-size // mmap.PAGESIZE)
            vector = (ctypes.c_ubyte * count)()
            if libc.mincore(ctypes.c_void_p(_address(mapped)), ctypes.c_size_t(size), vector):
                return None
            held += sum(byte & 1 for byte in vector)
            pages += count
    return held / pages if pages else 0.0


def _address(mapped: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(mapped, np.uint8).ctypes.data)


def purge(paths: Iterable[Path]) -> float | None:
    """Drop the files from the page cache; the share that is still there afterwards (None: cannot be told)."""
    paths = list(paths)
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(paths)


def warm(paths: Iterable[Path]) -> float | None:
    """Read the files through the page cache; the share of them that it then holds."""
    paths = list(paths)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return cached_share(paths)
