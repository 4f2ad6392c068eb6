"""What a run can find wrong with a kernel. Every fault is an exception that says where it happened."""

from __future__ import annotations


class MetalOnCpuError(Exception):
    """Anything this package raises on purpose."""


class CaptureError(MetalOnCpuError):
    """MLX refused to print the kernel: wrong arguments, or a version that prints otherwise."""


class TranslationError(MetalOnCpuError):
    """The printed source is outside the form that is understood."""


class CompileError(MetalOnCpuError):
    """The C++ compiler refused the kernel; the message holds its output."""


class KernelFault(MetalOnCpuError):
    """The kernel did something undefined. `line`: of the printed source, 0 where it is not known."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


class OutOfBounds(KernelFault):
    """An access outside every buffer, or beyond a threadgroup variable."""


class InputWrite(KernelFault):
    """A write to an input or to a program-scope constant."""


class Uninitialised(KernelFault):
    """A read of threadgroup memory or of an output that nothing has written."""


class Race(KernelFault):
    """Two lanes, or two threadgroups, access the same byte without a barrier between, and one of them writes."""


class Divergence(KernelFault):
    """Lanes that must meet at a simdgroup operation or a barrier stand at different places."""


class Misaligned(KernelFault):
    """A pointer that is null or not aligned for its type."""


class Undefined(KernelFault):
    """Undefined arithmetic or indexing: overflow, a shift too far, division by zero, a local array's end."""


class TooMuchMemory(KernelFault):
    """More threadgroup memory than a threadgroup may have."""


class OrderDependent(KernelFault):
    """Outputs differ in their bits when threadgroups or lanes run in another order."""


KINDS = (None, OutOfBounds, InputWrite, Uninitialised, Race, Divergence, Misaligned, Undefined, TooMuchMemory)
