"""Type-checks a printed kernel with its address spaces, by clang: what the run on the CPU erases.

Needs the package libclang (nothing of it is needed to run kernels). Metal's compiler is a clang, but not this one: what
passes here may still be refused there.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

from .translate import threadgroup_declarations, without_comments

TYPES = Path(__file__).with_name("types")
FLAGS = ("-xc++", "-std=c++17", "-nostdinc", "-Wno-everything", f"-I{TYPES}")
_ATTRIBUTE = re.compile(r"\[\[\s*\w+(?:\([^)]*\))?\s*\]\]")


def available() -> bool:
    """Whether libclang is installed."""
    return util.find_spec("clang") is not None


@cache
def _index() -> Any:
    from clang.cindex import Index

    return Index.create()


def problems(source: str) -> list[str]:
    """clang's errors in a printed kernel, "line: message", lines of the printed source; empty when there are none."""
    text = _ATTRIBUTE.sub("", without_comments(source))
    for place, _ in reversed(threadgroup_declarations(text)):
        text = f"{text[:place]}extern {text[place:]}"  # clang knows no locals of another space
    parsed = _index().parse(
        "kernel.cpp", args=FLAGS, unsaved_files=[("kernel.cpp", f'#include "metal_types.h"\n{text}')]
    )
    return [f"{found.location.line - 1}: {found.spelling}" for found in parsed.diagnostics if found.severity >= 3]
