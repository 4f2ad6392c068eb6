"""What MLX prints for each kernel and type is what was looked at and kept."""

from __future__ import annotations

import pytest

from tests.metal import golden
from tests.metal.harness.metal_on_cpu import address_spaces


@pytest.mark.parametrize("name", golden.cases())
def test_the_printed_source_is_the_kept_one(name: str) -> None:
    if not golden.DIRECTORY.exists():
        pytest.skip(f"no sources kept for this MLX: python -m tests.metal.golden makes {golden.DIRECTORY.name}")
    kept = (golden.DIRECTORY / f"{name}.metal").read_text(encoding="utf-8")
    assert golden.printed(golden.cases()[name]) == kept


def test_every_kept_source_has_its_kernel() -> None:
    if not golden.DIRECTORY.exists():
        pytest.skip("no sources kept for this MLX")
    assert {file.stem for file in golden.DIRECTORY.iterdir()} == set(golden.cases())


@pytest.mark.skipif(not address_spaces.available(), reason="libclang is not installed")
@pytest.mark.parametrize("name", [*golden.cases(), *(f"small {name}" for name in golden.small_cases())])
def test_address_spaces_and_types_agree(name: str) -> None:
    small = name.removeprefix("small ")
    run = golden.cases()[name] if small == name else golden.small_cases()[small]
    assert address_spaces.problems(golden.printed(run)) == []
