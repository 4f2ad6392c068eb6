"""The arrows between the parts: who imports whom, read from the sources; and what importing the package loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flashsparse"
HEAVY = ("mlx", "mlx_lm", "transformers", "torch")
# packs.py: what chat and demo share
CONVERTING = {"calibrate.py", "convert.py", "demo.py", "doctor.py", "eval.py", "packs.py", "sparsity.py"}


def imported(file: Path) -> Iterator[str]:
    """Every module an import statement of the file names, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def imports(*paths: Path) -> set[tuple[str, str]]:
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
    assert files
    return {(str(file.relative_to(ROOT)), module) for file in files for module in imported(file)}


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_metal_kernels_import_only_mlx() -> None:
    allowed = (*sys.stdlib_module_names, "mlx", "metal_kernels")
    assert not {pair for pair in imports(ROOT / "metal_kernels") if not is_in(pair[1], *allowed)}


def test_flash_and_cache_import_no_mlx_and_no_model_knowledge() -> None:
    own = ("flashsparse.errors", "flashsparse.flash", "flashsparse.native", "flashsparse.macos")
    allowed = (*sys.stdlib_module_names, "numpy", *own)
    found = imports(PACKAGE / "flash", PACKAGE / "cache.py", PACKAGE / "native")
    assert not {pair for pair in found if not is_in(pair[1], *allowed)}


def test_the_converter_is_reached_only_by_commands_that_convert() -> None:
    found = {file for file, module in imports(PACKAGE) if is_in(module, "converter")}
    assert found <= {f"flashsparse/cli/{name}" for name in CONVERTING}


def test_the_converter_uses_its_parts_of_the_runtime() -> None:
    allowed = tuple(f"flashsparse.{part}" for part in ("pack", "models", "sparsity", "flash", "engine", "errors"))
    found = {pair for pair in imports(ROOT / "converter") if is_in(pair[1], "flashsparse")}
    assert not {pair for pair in found if not is_in(pair[1], *allowed)}


def test_commands_see_tokens_and_text_never_weights() -> None:
    forbidden = (
        "mlx",
        "mlx_lm",
        "flashsparse.flash",
        "flashsparse.kernels",
        "flashsparse.native",
        "flashsparse.weights",
    )
    assert not {pair for pair in imports(PACKAGE / "cli") if is_in(pair[1], *forbidden)}


@pytest.mark.parametrize(
    "code", ["import flashsparse", "import flashsparse.flash, flashsparse.native, flashsparse.cache"]
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    check = f"import sys; print(sorted(set(sys.modules) & set({HEAVY!r})))"
    ran = subprocess.run([sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_help_loads_neither_mlx_nor_numpy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "flashsparse", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & {*HEAVY, "numpy"}
