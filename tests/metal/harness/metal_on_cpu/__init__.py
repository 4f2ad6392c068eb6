"""Runs the Metal kernels that MLX would compile on a CPU, lane by lane, and finds what is undefined in them.

`metal_kernel` stands in for `mx.fast.metal_kernel`; `capture`, `translate` and `Program` are its parts. README.md says
what is modelled and what is not. Needs MLX, numpy and a C++ compiler; no GPU.
"""

from . import address_spaces
from .build import compiler
from .capture import Call, Definition, capture
from .faults import (
    CaptureError,
    CompileError,
    Divergence,
    InputWrite,
    KernelFault,
    MetalOnCpuError,
    Misaligned,
    OrderDependent,
    OutOfBounds,
    Race,
    TooMuchMemory,
    TranslationError,
    Undefined,
    Uninitialised,
)
from .kernel import MetalKernel, metal_kernel
from .program import Program, Ran
from .translate import translate

__all__ = [
    "Call",
    "CaptureError",
    "CompileError",
    "Definition",
    "Divergence",
    "InputWrite",
    "KernelFault",
    "MetalKernel",
    "MetalOnCpuError",
    "Misaligned",
    "OrderDependent",
    "OutOfBounds",
    "Program",
    "Race",
    "Ran",
    "TooMuchMemory",
    "TranslationError",
    "Undefined",
    "Uninitialised",
    "address_spaces",
    "capture",
    "compiler",
    "metal_kernel",
    "translate",
]
