"""Runs `metal_kernels` in the harness where there is no Metal, and on the GPU where there is."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from metal_kernels import launch
from tests.metal.harness import metal_on_cpu


@pytest.fixture
def metal() -> Iterator[None]:
    """The kernels built by the harness, unless this machine has Metal."""
    if mx.metal.is_available():
        yield
        return
    if metal_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler and no Metal")
    with launch.stand_in(metal_on_cpu.metal_kernel):
        yield
