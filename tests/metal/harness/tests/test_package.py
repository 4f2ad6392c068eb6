"""The package stands alone: nothing of this repository is imported, and its README's example runs elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.metal.harness import metal_on_cpu as cpu

HARNESS = Path(cpu.__file__).parents[1]


@pytest.mark.skipif(cpu.compiler() is None, reason="no C++ compiler")
def test_the_readmes_example_runs_from_a_copy(tmp_path: Path) -> None:
    shutil.copytree(HARNESS / "metal_on_cpu", tmp_path / "metal_on_cpu")
    example = re.search(r"```python\n(.*?)```", (HARNESS / "README.md").read_text(encoding="utf-8"), re.S)
    assert example is not None
    code = f"import mlx.core as mx\na = mx.arange(40.0)\n{example[1]}\nassert mx.array_equal(y, 2 * a)\n"
    ran = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_the_wheel_would_hold_every_file() -> None:
    text = (HARNESS / "pyproject.toml").read_text(encoding="utf-8")
    folders = {path.name for path in (HARNESS / "metal_on_cpu").iterdir() if path.is_dir()} - {"__pycache__"}
    listed = re.search(r"metal_on_cpu = \[(.*?)\]", text)
    assert listed is not None and {name.strip().strip('"').split("/")[0] for name in listed[1].split(",")} == folders
