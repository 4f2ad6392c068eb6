"""The package as others get it: a wheel installed into an environment of its own, the demo run from `/`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]


def call(*command: str | Path, **options: object) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    output: str = done.stdout
    return output


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment outside the repository with only the wheel and its dependencies in it."""
    base = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    call(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", base, REPOSITORY)
    (wheel,) = base.glob("flashsparse-*.whl")
    call(sys.executable, "-m", "venv", base / "venv")
    call(base / "venv" / "bin" / "python", *pip, "install", wheel)
    return base


def outside(environment: Path) -> dict[str, object]:
    """Run from `/`, with a home of its own and nothing that leads back to the repository."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    home = {"HOME": str(environment), "XDG_CACHE_HOME": str(environment / "cache")}
    return {"cwd": "/", "env": kept | home}


def test_the_package_is_complete(environment: Path) -> None:
    script = (
        "import flashsparse, converter, metal_kernels, importlib.resources as r;"
        "from flashsparse import native; native.lib();"
        "root = r.files('flashsparse'); print(flashsparse.__file__);"
        "print(root.joinpath('py.typed').is_file(), root.joinpath('demo_model', 'config.json').is_file())"
    )
    output = call(environment / "venv" / "bin" / "python", "-c", script, **outside(environment))
    path, found = output.splitlines()
    assert Path(path).is_relative_to(environment)
    assert found == "True True"


def test_the_demo_runs_from_anywhere(environment: Path) -> None:
    command = environment / "venv" / "bin" / "flashsparse"
    output = call(command, "demo", "--seed", "1", "-n", "60", **outside(environment))
    for line in ("speed", "flash", "hit rate", "peak memory"):
        assert f"\n{line} " in output
    assert list((environment / "cache" / "flashsparse" / "demo").glob("*/pack.json"))
