"""ctypes bindings of the native library: CPU kernels and the read pool.

Thin: arrays and addresses in, cheap checks, no allocation beyond results. Importing this module loads nothing; the
library is found and loaded on first use. What the calls compute is stated in src/flashsparse.h.
"""

from __future__ import annotations

from flashsparse.native.kernels import (
    ACTIVATIONS,
    DTYPES,
    Matrix,
    Record,
    Workers,
    activate,
    active,
    attention,
    bits,
    ffn_down,
    ffn_hidden,
    gather,
    kv_append,
    linear,
    memory_read,
    score,
    select,
    touch,
)
from flashsparse.native.library import isa, lib, set_isa

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "Matrix",
    "Record",
    "Workers",
    "activate",
    "active",
    "attention",
    "bits",
    "ffn_down",
    "ffn_hidden",
    "gather",
    "isa",
    "kv_append",
    "lib",
    "linear",
    "memory_read",
    "score",
    "select",
    "set_isa",
    "touch",
]
