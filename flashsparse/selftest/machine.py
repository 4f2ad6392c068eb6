"""What a self test ran on: processor, memory, system, GPU and versions, as plain values."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flashsparse
from flashsparse import native
from flashsparse.memory import machine_memory

PACKAGES = ("mlx", "mlx-metal", "mlx-lm", "numpy", "transformers")


def facts() -> dict[str, Any]:
    """Of this machine and installation. `metal`: what MLX says of the GPU, None where there is none."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": machine_memory(),
        "system": _system(),
        "python": platform.python_version(),
        "flashsparse": flashsparse.__version__,
        "versions": versions(),
        "isa": native.isa(),
        "metal": gpu(),
    }


def processor() -> str:
    """Its name as the system has it."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        return ran.stdout.strip() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu() -> dict[str, Any] | None:
    """MLX's facts of the Metal device."""
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    return {name: value for name, value in info.items() if isinstance(value, str | int | float)}
