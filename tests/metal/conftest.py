"""Runs `metal_kernels` in the harness where there is no Metal, and on the GPU where there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from flashsparse.metal.refills import Refills
from metal_kernels import launch
from tests.metal import plain
from tests.metal.harness import metal_on_cpu
from tests.metal.kinds import KINDS


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


@pytest.fixture
def stand_in() -> Iterator[None]:
    """On the CPU, also where there is a GPU: in float32."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    with launch.stand_in(plain.metal_kernel):
        yield
    mx.set_default_device(device)


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: KINDS[name](root / name) for name in ("exact", "compact", "gate-copy", "dense")}


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of Python's development mode."""
    made = Refills.__post_init__

    def on(self: Refills) -> None:
        made(self)
        self.debug = True

    monkeypatch.setattr(Refills, "__post_init__", on)
