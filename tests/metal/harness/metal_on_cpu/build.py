"""Compiles translated kernels into shared libraries, kept by the hash of everything that goes into them.

The kernel is instrumented by the compiler's thread and undefined-behaviour sanitizers, whose runtime is
`shim/*.cpp`: no sanitizer library is linked. Owns the cache directory, which may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from .faults import CompileError

SHIM = Path(__file__).with_name("shim")
BASE = ("-std=c++17", "-fPIC", "-g1", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", f"-I{SHIM}")
# Helpers stay calls, so that the path to a collective can be told; shim functions are always inlined.
KERNEL = (
    "-O1",
    "-fno-inline",
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow,unreachable",
    "-fsanitize-recover=all",
    "-ftrivial-auto-var-init=pattern",
    "-fno-strict-aliasing",
    "-Wall",
    "-Werror=uninitialized",
    "-Werror=return-type",
    "-Wno-unknown-pragmas",
    "-Wno-unused-variable",
    "-Wno-unused-function",
    "-Wno-class-memaccess",
)
# A call that is copied has two addresses, and lanes would seem to be in different ones.
GCC = ("-fno-thread-jumps",)


def compiler() -> str | None:
    """The C++ compiler's path: $CXX, else the first of g++, clang++ and c++; None where there is none."""
    named = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in named if name and (found := shutil.which(name))), None)


@cache
def cache_directory() -> Path:
    """Where built kernels are kept: metal_on_cpu in the user's cache directory, or a temporary one."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for place in (base / "metal_on_cpu", Path(tempfile.gettempdir()) / f"metal_on_cpu-{os.getuid()}"):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise CompileError("no writable cache directory: expected ~/.cache or the temporary directory to be one")


@cache
def _identity() -> bytes:
    """The compiler and the shim: what every library depends on."""
    found = compiler()
    if found is None:
        raise CompileError("no C++ compiler found: install g++ or clang++, or set CXX")
    version = subprocess.run([found, "--version"], capture_output=True, check=True).stdout
    shim = b"".join(file.read_bytes() for file in sorted(SHIM.iterdir()))
    return b"\0".join((version, shim, repr((BASE, KERNEL, GCC, platform.machine())).encode()))


def build(cpp: str) -> Path:
    """The shared library of a translated kernel, compiled unless it is cached. Raises CompileError."""
    digest = hashlib.sha256(_identity() + b"\0" + cpp.encode()).hexdigest()[:32]
    library = cache_directory() / f"{digest}.so"
    if not library.exists():
        _publish(library, lambda work: _link(cpp, work))
    return library


def _runtime() -> list[Path]:
    """The runtime's objects, compiled once."""
    made = []
    for source in sorted(SHIM.glob("*.cpp")):
        digest = hashlib.sha256(source.name.encode() + b"\0" + _identity()).hexdigest()[:32]
        kept = cache_directory() / f"{digest}.o"
        if not kept.exists():
            _publish(kept, partial(_compile, source, ("-O2", "-fvisibility=hidden")))
        made.append(kept)
    return made


def _publish(place: Path, make: Callable[[Path], Path]) -> None:
    """Makes a file beside its place and renames it there, so that two processes may build at once."""
    with tempfile.TemporaryDirectory(dir=place.parent) as directory:
        os.replace(make(Path(directory)), place)


def _link(cpp: str, work: Path) -> Path:
    source = work / "kernel.cpp"
    source.write_text(cpp, encoding="utf-8")
    flags = KERNEL if b"clang" in _identity() else (*KERNEL, *GCC)
    kernel = _compile(source, flags, work)
    undefined = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()
    library = work / "kernel.so"
    _call("-shared", "-o", str(library), str(kernel), *map(str, _runtime()), *undefined, "-lm")
    return library


def _compile(source: Path, flags: tuple[str, ...], work: Path) -> Path:
    to = work / f"{source.stem}.o"
    _call(*BASE, *flags, "-c", str(source), "-o", str(to))
    return to


def _call(*arguments: str) -> None:
    found = compiler()
    assert found is not None
    ran = subprocess.run([found, *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise CompileError(ran.stderr[:4000])
