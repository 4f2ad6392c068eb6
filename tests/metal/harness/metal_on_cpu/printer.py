"""The child process of `capture`: reads requests from standard input, answers with what MLX printed. A script.

Its own answers go to a copy of standard output; the real one, which MLX's C++ writes to, is a temporary file.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from typing import Any

import mlx.core as mx


def trace(definition: dict[str, Any], call: dict[str, Any], directory: str) -> None:
    """Traces one call of the kernel; MLX prints on the way."""
    kernel = mx.fast.metal_kernel(**definition)
    template = [
        (name, getattr(mx, value["dtype"]) if isinstance(value, dict) else value) for name, value in call["template"]
    ]

    def run(*inputs: mx.array) -> Any:
        return kernel(
            inputs=list(inputs),
            output_shapes=call["output_shapes"],
            output_dtypes=[getattr(mx, name) for name in call["output_dtypes"]],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            template=template,
            verbose=True,
        )

    arrays = [
        mx.zeros(shape, getattr(mx, name))
        for shape, name in zip(call["input_shapes"], call["input_dtypes"], strict=True)
    ]
    mx.export_function(os.path.join(directory, "traced"), run, *arrays)


def printed(request: dict[str, Any], file: Any, directory: str, libc: ctypes.CDLL) -> dict[str, str]:
    """The answer to one request."""
    file.seek(0)
    file.truncate()
    os.lseek(1, 0, os.SEEK_SET)
    try:
        trace(request["definition"], request["call"], directory)
    except (RuntimeError, ValueError, TypeError) as error:
        libc.fflush(None)
        return {"error": str(error)}
    libc.fflush(None)
    file.seek(0)
    return {"printed": file.read().decode()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    libc = ctypes.CDLL(None)
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        for line in sys.stdin:
            answers.write(json.dumps(printed(json.loads(line), file, directory, libc)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
