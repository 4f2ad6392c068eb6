"""For every test: what `kernels="auto"` means does not depend on the machine; tests/metal asks for the GPU by name."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def auto_is_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels' bits do not depend on the batch, which tests rely on; MLX does not promise that."""
    if sys.platform == "darwin" and "metal" not in request.path.parts:
        monkeypatch.setattr("flashsparse.kernels._has_metal", lambda: False)
